"""safetensors_io against the public reader and writer, and against broken files."""

import functools
import json
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from animecolor_jax import safetensors_io
from animecolor_jax.errors import InputError
from animecolor_jax.safetensors_io import Reader, Spec, write

DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]


def make_leaves():
    """One leaf per dtype, and odd shapes: none of their sizes is a multiple of 8 bytes."""
    rng = np.random.default_rng(0)
    leaves = {name: rng.integers(0, 2, (3, 5)).astype(jnp.dtype(name)) for name in DTYPES}
    return leaves | {
        "scalar": np.float32(1.5),
        "empty": np.zeros((0, 4), np.int8),
        "kernel/ü": rng.normal(size=(2, 3, 7)).astype(ml_dtypes.bfloat16),
        "transposed": rng.normal(size=(4, 6)).T,
    }


def write_leaves(path, leaves, metadata=None):
    specs = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    write(path, specs, leaves.items(), metadata)


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name, leaf in left.items():
        assert (leaf.shape, leaf.dtype) == (right[name].shape, right[name].dtype), name
        np.testing.assert_array_equal(leaf, right[name], err_msg=name)


def test_public_reader_reads_what_we_write(tmp_path):
    leaves = make_leaves()
    write_leaves(tmp_path / "w.safetensors", leaves, {"format": "x"})
    with safetensors.safe_open(tmp_path / "w.safetensors", "np") as file:
        assert file.metadata() == {"format": "x"}
        assert set(file.keys()) == set(leaves)
        assert_equal({name: file.get_tensor(name) for name in leaves}, leaves)
    assert_equal(safetensors.numpy.load_file(tmp_path / "w.safetensors"), leaves)


def test_we_read_what_the_public_writer_writes(tmp_path):
    leaves = {name: np.ascontiguousarray(leaf) for name, leaf in make_leaves().items()}
    safetensors.numpy.save_file(leaves, tmp_path / "w.safetensors", {"format": "np"})
    with Reader(tmp_path / "w.safetensors") as reader:
        assert reader.metadata == {"format": "np"}
        assert reader.specs == {name: Spec(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
        assert_equal({name: reader.read(name) for name in reader.specs}, leaves)


def test_header_is_aligned_and_file_is_the_same_in_any_order_of_leaves(tmp_path):
    leaves = make_leaves()
    write_leaves(tmp_path / "a", leaves)
    specs = {name: Spec(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    write(tmp_path / "b", specs, reversed(leaves.items()))
    data = (tmp_path / "a").read_bytes()
    assert data == (tmp_path / "b").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    entries = json.loads(data[8 : 8 + length])
    for name, entry in entries.items():
        assert entry["data_offsets"][0] % leaves[name].dtype.itemsize == 0, name


@pytest.mark.parametrize(
    "given, match",
    [
        ([("a", np.zeros(3, np.float32))], "not given.*'b'"),
        ([("a", np.zeros(3, np.float32))] * 2, "'a' was given twice"),
        ([("c", np.zeros(3, np.float32))], "'c' was not announced"),
        ([("a", np.zeros(4, np.float32))], r"'a' is float32\[4\], announced as float32\[3\]"),
        ([("a", np.zeros(3, np.float64))], r"'a' is float64\[3\], announced as float32\[3\]"),
    ],
)
def test_leaves_that_do_not_fit_leave_no_file(tmp_path, given, match):
    specs = {"a": Spec((3,), np.dtype("float32")), "b": Spec((), np.dtype("int8"))}
    with pytest.raises(ValueError, match=match):
        write(tmp_path / "w.safetensors", specs, given)
    assert list(tmp_path.iterdir()) == []


def test_failing_write_keeps_the_old_file(tmp_path):
    write_leaves(tmp_path / "w.safetensors", {"a": np.arange(3)})
    before = (tmp_path / "w.safetensors").read_bytes()

    def interrupted():
        yield "a", np.arange(4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "w.safetensors", {"a": Spec((4,), np.dtype("int64"))}, interrupted())
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]
    assert (tmp_path / "w.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "specs, metadata, match",
    [
        ({"a": Spec((1,), np.dtype("complex64"))}, None, "'a' has dtype complex64"),
        ({"__metadata__": Spec((1,), np.dtype("int8"))}, None, "__metadata__"),
        ({}, {"step": 3}, "strings only"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path, specs, metadata, match):
    with pytest.raises(ValueError, match=match):
        write(tmp_path / "w.safetensors", specs, [], metadata)
    assert list(tmp_path.iterdir()) == []


INDICES = [
    (),
    (slice(None),),
    (slice(2, 5),),
    (slice(None), slice(1, 3)),
    (slice(3, 4), slice(1, 3)),
    (slice(1, 5), slice(None), slice(2, 9)),
    (slice(0, 6, 1), slice(0, 4), slice(8, None)),
    (slice(-2, None), slice(2, 2)),
]


@pytest.mark.parametrize("cut_bytes", [1, 60, 1 << 20])
@pytest.mark.parametrize("index", INDICES)
def test_slice_equals_slice_of_the_whole(tmp_path, monkeypatch, cut_bytes, index):
    monkeypatch.setattr(safetensors_io, "_CUT_BYTES", cut_bytes)  # rows read whole, by parts, together
    leaf = np.arange(6 * 4 * 10).reshape(6, 4, 10).astype(ml_dtypes.bfloat16)
    write_leaves(tmp_path / "w", {"other": np.arange(5.0), "a": leaf, "scalar": np.int8(3)})
    with Reader(tmp_path / "w") as reader:
        np.testing.assert_array_equal(reader.read_slice("a", index), leaf[index])
        assert reader.read_slice("scalar", ()) == 3


@pytest.mark.parametrize("index", [(slice(0, 4, 2),), (slice(None), slice(None), slice(None))])
def test_slice_with_steps_or_too_many_axes_is_refused(tmp_path, index):
    write_leaves(tmp_path / "w", {"a": np.zeros((4, 2))})
    with Reader(tmp_path / "w") as reader, pytest.raises(ValueError, match="slice of step 1"):
        reader.read_slice("a", index)


def test_sharded_leaf_is_read_by_slices(tmp_path):
    leaf = np.arange(8 * 16, dtype=np.float32).reshape(8, 16)
    write_leaves(tmp_path / "w", {"a": leaf})
    mesh = jax.make_mesh((1,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", None))
    with Reader(tmp_path / "w") as reader:
        read = functools.partial(reader.read_slice, "a")
        array = jax.make_array_from_callback(leaf.shape, sharding, read)
    np.testing.assert_array_equal(array, leaf)


def peak_bytes(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_copying_a_file_holds_one_leaf_at_a_time(tmp_path):
    leaves = {f"l{i}": np.full((1 << 18,), i, np.float32) for i in range(16)}  # 1 MiB each
    write_leaves(tmp_path / "a", leaves)

    def copy():
        with Reader(tmp_path / "a") as reader:
            write(tmp_path / "b", reader.specs, ((name, reader.read(name)) for name in reader.specs))

    assert peak_bytes(copy) < 2.5 * (1 << 20)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_slice_of_rows_reads_only_the_rows(tmp_path):
    write_leaves(tmp_path / "a", {"a": np.zeros((64, 1 << 16), np.uint8)})
    with Reader(tmp_path / "a") as reader:
        assert peak_bytes(lambda: reader.read_slice("a", (slice(3, 5),))) < 1 << 18


def raw(header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(begin=0, end=4, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


BROKEN = {
    "empty": (b"", "empty"),
    "shorter than its length field": (b"\1\2", "truncated"),
    "header longer than the file": (raw({"a": entry()}, length=1 << 40), "truncated"),
    "header cut": (raw(b'{"a": {"dtype"'), "JSON|damaged"),
    "header no UTF-8": (raw(b"\xff\xfe{}"), "damaged"),
    "header no object": (raw([1, 2]), "damaged"),
    "header nested without end": (raw(b"[" * 100_000), "damaged"),
    "name twice": (raw(b'{"a": 1, "a": 2}'), "'a' occurs twice"),
    "NaN": (raw(b'{"a": NaN}'), "NaN is not JSON"),
    "data truncated": (raw({"a": entry(0, 8, (2,))}, b"\0" * 4), "truncated"),
    "bytes left over": (raw({"a": entry()}, b"\0" * 5), "damaged"),
    "overlap": (raw({"a": entry(), "b": entry()}, b"\0" * 4), "'b' begins at 0"),
    "gap": (raw({"a": entry(), "b": entry(8, 12)}, b"\0" * 12), "'b' begins at 8"),
    "offset out of range": (raw({"a": entry(1 << 50, (1 << 50) + 4)}, b"\0" * 4), "'a' begins at"),
    "negative offset": (raw({"a": entry(-4, 0)}, b"\0" * 4), "'a' begins at -4"),
    "size does not fit": (raw({"a": entry(shape=(2,))}, b"\0" * 4), "bytes 0 to 4"),
    "unknown dtype": (raw({"a": entry(dtype="F8_E4M3")}, b"\0" * 4), "F8_E4M3"),
    "negative size": (raw({"a": entry(shape=(-1, -1))}, b"\0" * 4), "impossible shape"),
    "size that is no integer": (raw({"a": entry(shape=(1.0,))}, b"\0" * 4), "impossible shape"),
    "size beyond NumPy": (raw({"a": entry(0, 0, shape=(0, 1 << 70))}), "impossible shape"),
    "more axes than NumPy has": (raw({"a": entry(shape=(1,) * 99)}, b"\0" * 4), "impossible shape"),
    "entry without shape": (raw({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"\0" * 4), "entry of 'a'"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_named_and_refused(tmp_path, name):
    data, match = BROKEN[name]
    path = tmp_path / "broken.safetensors"
    path.write_bytes(data)
    with pytest.raises(InputError, match=match) as error:
        Reader(path)
    assert error.value.where == str(path) and error.value.fix


def test_missing_file_is_named_and_refused(tmp_path):
    with pytest.raises(InputError, match="missing.safetensors: cannot be read"):
        Reader(tmp_path / "missing.safetensors")


def test_every_truncation_is_refused(tmp_path):
    write_leaves(tmp_path / "whole", {"a": np.arange(3.0), "b": np.int8([1, 2])}, {"k": "v"})
    data = (tmp_path / "whole").read_bytes()
    for size in range(len(data)):
        (tmp_path / "cut").write_bytes(data[:size])
        with pytest.raises(InputError, match="cut"):
            Reader(tmp_path / "cut")


def test_file_that_shrinks_after_opening_is_refused(tmp_path):
    write_leaves(tmp_path / "w", {"a": np.zeros(1 << 16)})
    with Reader(tmp_path / "w") as reader:
        with open(tmp_path / "w", "r+b") as file:
            file.truncate(1000)
        with pytest.raises(InputError, match="truncated"):
            reader.read("a")


@pytest.mark.torch
def test_torch_safetensors_round_trip_bitwise(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(0)
    tensors = {
        "bf16": torch.randn(3, 4, generator=generator).bfloat16(),
        "f16": torch.randn(5, generator=generator).half(),
        "i64": torch.arange(7),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
    }
    save_file(tensors, tmp_path / "torch.safetensors")
    with Reader(tmp_path / "torch.safetensors") as reader:
        leaves = {name: reader.read(name) for name in reader.specs}
    assert leaves["bf16"].dtype == ml_dtypes.bfloat16
    write_leaves(tmp_path / "ours.safetensors", leaves, {"format": "pt"})
    loaded = load_file(tmp_path / "ours.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
