import os

import numpy as np
import pytest

from animecolor_jax.errors import InputError
from data_pipeline.storage import CACHE_VARIABLE, Storage, _filesystem


@pytest.fixture(params=["local", "memory"])
def storage(request, tmp_path):
    if request.param == "local":
        yield Storage(tmp_path / "folder")
    else:
        store = Storage(f"memory://{tmp_path.name}/folder")
        yield store
        store.remove()


def test_files_are_written_read_listed_and_removed(storage):
    assert not storage.exists("a/b.txt") and storage.names("a") == []
    storage.write("a/b.txt", b"one")
    storage.write("a/c/d.txt", b"three")
    storage.write("e.txt", b"")
    storage.write("a/b.txt", b"replaced")
    assert storage.read("a/b.txt") == b"replaced" and storage.size("a/b.txt") == 8
    assert storage.names("a") == ["a/b.txt"]
    assert storage.names(recursive=True) == ["a/b.txt", "a/c/d.txt", "e.txt"]
    assert (storage / "a").names(recursive=True) == ["b.txt", "c/d.txt"]
    storage.remove("a")
    storage.remove("a")
    assert storage.names(recursive=True) == ["e.txt"]
    with pytest.raises(FileNotFoundError):
        storage.read("a/b.txt")


def test_a_file_that_was_not_finished_never_gets_its_name(storage):
    with pytest.raises(RuntimeError), storage.writing("a/b.bin") as path:
        path.write_bytes(b"half")
        raise RuntimeError("killed")
    assert not storage.exists("a/b.bin") and storage.names(recursive=True) == []


def test_half_written_files_of_a_killed_process_are_not_listed(tmp_path):
    (tmp_path / ".1234-clip.mp4").write_bytes(b"half")
    assert Storage(tmp_path).names() == []


def test_half_written_files_are_swept_when_nobody_can_be_writing_them(tmp_path):
    old, young = tmp_path / "a" / ".12345678-clip.mp4", tmp_path / ".12345678-clip.mp4"
    other = tmp_path / ".hidden"
    old.parent.mkdir()
    for path in (old, young, other):
        path.write_bytes(b"half")
    for path in (old, other):
        os.utime(path, (0, 0))
    Storage(tmp_path).sweep()
    assert not old.exists() and young.exists() and other.exists()


def test_local_paths_hold_the_contents(storage):
    storage.write("a/video.mp4", b"bytes")
    with storage.local("a/video.mp4") as path:
        assert path.suffix == ".mp4" and path.read_bytes() == b"bytes"


def test_stamps_change_with_the_file(storage):
    storage.write("a", b"one")
    before = storage.stamp("a")
    assert storage.stamp("a") == before
    storage.write("a", b"other")
    assert storage.stamp("a") != before


def test_a_mirror_is_fetched_once_and_again_when_the_version_changes(storage, tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    storage.write("shards/0", b"zero")
    storage.write("shards/1", b"one")
    first = storage.mirror("shards", "v1")
    assert {path.name: path.read_bytes() for path in first.iterdir()} == {"0": b"zero", "1": b"one"}
    storage.write("shards/1", b"new")
    second = storage.mirror("shards", "v2")
    assert (second / "1").read_bytes() == b"new"
    if storage.root.startswith("memory"):
        assert (storage.mirror("shards", "v1") / "1").read_bytes() == b"one", "the copy is used as it is"


def test_an_unknown_kind_of_url_is_refused_with_the_way_to_mend_it():
    with pytest.raises(InputError, match="s3fs for s3://"):
        Storage("nowhere://bucket/data")


def test_threads_and_processes_get_the_same_store(storage):
    import pickle

    storage.write("a", np.arange(3, dtype=np.uint8).tobytes())
    assert pickle.loads(pickle.dumps(storage)).read("a") == b"\0\1\2"


def test_links_in_a_circle_are_followed_once_and_links_to_nowhere_are_listed(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "clip.mp4").write_bytes(b"x")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    (tmp_path / "lost.mp4").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.mp4")
    assert Storage(tmp_path).names(recursive=True) == ["a/clip.mp4", "lost.mp4"]


def test_what_another_process_writes_is_seen(tmp_path):
    """fsspec's cache of listings would hide it, and never expires."""
    storage = Storage(f"memory://{tmp_path.name}/folder")
    assert _filesystem(storage.root).storage_options["use_listings_cache"] is False
