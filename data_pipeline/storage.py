"""Files in a folder or an object store: the one place that knows local paths from gs:// and s3://.

A name appears only when all of the file is there: local files are renamed into place, objects appear whole.
"""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import fsspec

from animecolor_jax.errors import InputError

_PARTIAL = re.compile(r"\.[0-9a-f]{8}-.")
CACHE_VARIABLE = "ANIMECOLOR_CACHE"  # where shards of object stores are kept on this host


def is_remote(root):
    """Whether `root` is a URL such as gs://bucket/folder."""
    return "://" in str(root)


@dataclass(frozen=True)
class Storage:
    """The files below a folder `root`: a local path, or a URL that fsspec knows (gs://, s3://, memory://).

    Names are relative and have forward slashes. OSError (FileNotFoundError among them) as for any file.
    """

    root: str

    def __post_init__(self):
        object.__setattr__(self, "root", str(self.root).rstrip("/") or "/")
        if is_remote(self.root):
            _filesystem(self.root)  # a missing driver shows here, before any work

    def __truediv__(self, name):
        return Storage(f"{self.root}/{name}")

    def __str__(self):
        return self.root

    def path(self, name=""):
        """The full path or URL of `name`."""
        return f"{self.root}/{name}" if name else self.root

    def exists(self, name=""):
        """Whether there is a file or folder of that name."""
        if is_remote(self.root):
            return _filesystem(self.root).exists(self.path(name))
        return os.path.exists(self.path(name))

    def read(self, name):
        """The file's bytes."""
        if is_remote(self.root):
            return _filesystem(self.root).cat_file(self.path(name))
        return Path(self.path(name)).read_bytes()

    def write(self, name, data):
        """Writes bytes; an existing file is replaced in one step."""
        with self.writing(name) as path:
            path.write_bytes(data)

    @contextlib.contextmanager
    def writing(self, name):
        """A local path to write to; at the end the file takes its name, or vanishes on any exception."""
        target = self.path(name)
        if is_remote(self.root):
            with tempfile.TemporaryDirectory() as folder:
                partial = Path(folder) / Path(name).name
                yield partial
                _filesystem(self.root).put_file(str(partial), target)
            return
        target = Path(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{uuid.uuid4().hex[:8]}-{target.name}")
        try:
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())  # a name must not outlive its contents, even when the power fails
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    def size(self, name):
        """Bytes of the file."""
        if is_remote(self.root):
            return _filesystem(self.root).size(self.path(name))
        return os.path.getsize(self.path(name))

    def stamp(self, name):
        """Text that changes when the file does: size and modification time, or the store's own tag."""
        if is_remote(self.root):
            info = _filesystem(self.root).info(self.path(name))
            tags = (info.get(key) for key in ("ETag", "etag", "crc32c", "md5Hash", "mtime", "created"))
            return f"{info['size']} {next(filter(None, tags), '')}"
        status = os.stat(self.path(name))
        return f"{status.st_size} {status.st_mtime_ns}"

    def names(self, folder="", *, recursive=False):
        """Names (relative to `root`) of the files in `folder`, sorted; none if it is missing.

        Hidden files, as half-written ones are, and whatever lies in hidden folders are left out.
        """
        if is_remote(self.root):
            found = self._remote_names(folder, recursive)
        else:
            found = self._local_names(folder, recursive)
        return sorted(name for name in found if not any(part.startswith(".") for part in name.split("/")))

    def _remote_names(self, folder, recursive):
        filesystem = _filesystem(self.root)
        start = filesystem._strip_protocol(self.path(folder))
        if not filesystem.exists(start):
            return []
        base = filesystem._strip_protocol(self.root).rstrip("/") + "/"
        found = filesystem.find(start, maxdepth=None if recursive else 1)
        return [path.removeprefix(base) for path in found]

    def _local_names(self, folder, recursive):
        base = Path(self.root)
        start = base / folder
        if recursive:
            paths = _walk(start) if start.is_dir() else ()
        else:
            paths = start.iterdir() if start.is_dir() else ()
        # A link to nowhere is listed, so that somebody says what became of it; pipes and sockets are not.
        return [path.relative_to(base).as_posix() for path in paths if path.is_file() or not path.exists()]

    def remove(self, name=""):
        """Deletes the file or the whole folder; nothing happens if it is missing."""
        if is_remote(self.root):
            if self.exists(name):
                _filesystem(self.root).rm(self.path(name), recursive=True)
        elif os.path.isdir(self.path(name)):
            shutil.rmtree(self.path(name))
        else:
            Path(self.path(name)).unlink(missing_ok=True)

    def sweep(self):
        """Deletes what killed processes left half-written an hour ago or earlier; younger may be in use."""
        if is_remote(self.root):
            return
        for parent, _, files in os.walk(self.root):
            for name in files:
                path = Path(parent, name)
                if _PARTIAL.match(name) and time.time() - path.stat().st_mtime > 3600:
                    path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def local(self, name):
        """A local path of the file for as long as the context lasts: the file itself, or a copy."""
        if not is_remote(self.root):
            yield Path(self.path(name))
            return
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / Path(name).name
            _filesystem(self.root).get_file(self.path(name), str(copy))
            yield copy

    def mirror(self, folder, version):
        """A lasting local path of a folder: itself, or a copy below $ANIMECOLOR_CACHE (default
        ~/.cache/animecolor). A file is fetched once for all processes of this host.

        Args:
            version: text that changes when the contents do.
        """
        if not is_remote(self.root):
            return Path(self.path(folder))
        home = Path(os.environ.get(CACHE_VARIABLE, Path.home() / ".cache" / "animecolor"))
        mark = hashlib.sha256(f"{self.path(folder)} {version}".encode()).hexdigest()[:16]
        copy = Storage(str(home / mark))
        for name in self.names(folder, recursive=True):
            inside = str(Path(name).relative_to(folder))
            if not copy.exists(inside):
                with copy.writing(inside) as partial:
                    _filesystem(self.root).get_file(self.path(name), str(partial))
        return Path(copy.root)


def _walk(start):
    """All files below a folder, links followed, each folder once; OSError for one that cannot be read."""

    def stop(error):
        raise error

    seen = set()
    for parent, folders, files in os.walk(start, followlinks=True, onerror=stop):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        yield from (Path(parent, name) for name in files)


def _filesystem(root):
    try:
        # No cache of listings: other processes and computers write, too.
        return fsspec.core.url_to_fs(root, use_listings_cache=False)[0]
    except (ImportError, ValueError) as error:
        raise InputError(
            f"cannot be reached: {error}",
            where=root,
            expected="a local folder, or a URL whose fsspec driver is installed",
            fix="pip install gcsfs for gs://, s3fs for s3://",
        ) from error
