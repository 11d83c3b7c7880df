"""Files and folders that appear whole or not at all."""

import contextlib
import os
import shutil
import uuid
from pathlib import Path


@contextlib.contextmanager
def replacing(path):
    """A hidden name beside `path`, with its suffix, for a file or folder that takes its place at the end, or
    is removed on any exception. Missing parent folders are made."""
    path, mark = Path(path), uuid.uuid4().hex[:8]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}-{mark}{path.suffix}")
    old = path.with_name(f".{path.stem}-{mark}-old")
    try:
        yield partial
        if path.is_dir():  # a folder cannot be replaced in one step, only moved away
            os.replace(path, old)
        os.replace(partial, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise
    finally:
        for leftover in (partial, old):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)
