"""torch_pickle: what torch.save wrote is read exactly; whatever else a file asks for is not done."""

import builtins
import os
import pickle
import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from animecolor_jax.convert import torch_pickle
from animecolor_jax.convert.torch_pickle import TorchCheckpoint, TorchTensor
from animecolor_jax.errors import InputError

# A pickle assembler, so that these tests need no PyTorch and can write what it never would.


def value(item):
    """Instructions that push plain data."""
    return pickle.dumps(item, protocol=2)[2:-1]


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def pack(*parts):
    return b"(" + b"".join(parts) + b"t"


def call(module, attribute, *args):
    return name(module, attribute) + pack(*args) + b"R"


def mapping(items):
    return b"}(" + b"".join(value(key) + part for key, part in items.items()) + b"u"


def storage(key="0", numel=6, kind="FloatStorage", *view):
    head = (value("storage"), name("torch", kind), value(key), value("cpu"), value(numel))
    return pack(*head, *view) + b"Q"


def tensor(stored=None, start=0, shape=(2, 3), strides=(3, 1), *metadata):
    hooks = call("collections", "OrderedDict")
    numbers = value(start), value(tuple(shape)), value(tuple(strides))
    stored = storage() if stored is None else stored
    return call("torch._utils", "_rebuild_tensor_v2", stored, *numbers, value(False), hooks, *metadata)


def finish(instructions):
    return b"\x80\2" + instructions + b"."


DATA = {"0": np.arange(6, dtype=np.float32).tobytes()}


def write_zip(path, instructions, data=DATA, folder="archive", byteorder=b"little", **extra):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{folder}/data.pkl", finish(instructions))
        if byteorder is not None:
            archive.writestr(f"{folder}/byteorder", byteorder)
        for key, content in data.items():
            archive.writestr(f"{folder}/data/{key}", content)
        for file, content in extra.items():
            archive.writestr(file, content)


def write_legacy(path, instructions, data=DATA, itemsize=4, keys=None):
    pickles = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    parts = [pickle.dumps(item, protocol=2) for item in pickles] + [finish(instructions)]
    parts.append(pickle.dumps(sorted(data) if keys is None else keys, protocol=2))
    for key in sorted(data):
        parts.append(struct.pack("<q", len(data[key]) // itemsize) + data[key])
    path.write_bytes(b"".join(parts))


WRITERS = pytest.mark.parametrize("write", [write_zip, write_legacy])


def read_one(path, key="w"):
    with TorchCheckpoint(path) as checkpoint:
        return checkpoint.root[key].read()


@WRITERS
def test_tensor_is_read_with_shape_dtype_and_values(tmp_path, write):
    write(tmp_path / "w.pt", mapping({"w": tensor(), "epoch": value(3)}))
    with TorchCheckpoint(tmp_path / "w.pt") as checkpoint:
        weight = checkpoint.root["w"]
        assert checkpoint.root["epoch"] == 3
        assert (weight.shape, weight.dtype) == ((2, 3), np.float32)
        np.testing.assert_array_equal(weight.read(), [[0, 1, 2], [3, 4, 5]])


@WRITERS
@pytest.mark.parametrize(
    "start, shape, strides, expected",
    [
        (0, (3, 2), (1, 3), [[0, 3], [1, 4], [2, 5]]),  # transposed
        (1, (2, 2), (3, 1), [[1, 2], [4, 5]]),  # columns cut
        (2, (2, 3), (0, 1), [[2, 3, 4], [2, 3, 4]]),  # expanded
        (5, (), (), 5),
        (4, (1, 2), (1 << 62, 1), [[4, 5]]),  # any stride fits an axis of one element
        (6, (0, 3), (3, 1), np.zeros((0, 3))),
        (0, (2, 2), (2, 2), [[0, 2], [2, 4]]),  # overlapping
    ],
)
def test_strided_views_are_read_as_torch_reads_them(tmp_path, write, start, shape, strides, expected):
    write(tmp_path / "w.pt", mapping({"w": tensor(None, start, shape, strides)}))
    array = read_one(tmp_path / "w.pt")
    assert array.shape == shape and array.flags.c_contiguous
    np.testing.assert_array_equal(array, expected)


@WRITERS
def test_tensors_share_a_storage(tmp_path, write):
    parts = {"all": tensor(), "row": tensor(None, 3, (3,), (1,))}
    write(tmp_path / "w.pt", mapping(parts))
    np.testing.assert_array_equal(read_one(tmp_path / "w.pt", "all")[1], read_one(tmp_path / "w.pt", "row"))


@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("DoubleStorage", np.float64),
        ("HalfStorage", np.float16),
        ("BFloat16Storage", ml_dtypes.bfloat16),
        ("LongStorage", np.int64),
        ("IntStorage", np.int32),
        ("ShortStorage", np.int16),
        ("CharStorage", np.int8),
        ("ByteStorage", np.uint8),
        ("BoolStorage", np.bool_),
    ],
)
@pytest.mark.parametrize("byteorder", [None, b"little", b"big"])
def test_dtypes_and_byte_orders(tmp_path, kind, dtype, byteorder):
    expected = np.array([0, 1, 1, 0, 1, 0]).astype(dtype).reshape(2, 3)
    stored = expected.view(f"u{expected.itemsize}")
    data = (stored.byteswap() if byteorder == b"big" else stored).tobytes()
    parts = mapping({"w": tensor(storage("7", 6, kind))})
    write_zip(tmp_path / "w.pt", parts, {"7": data}, byteorder=byteorder)
    array = read_one(tmp_path / "w.pt")
    assert array.dtype == dtype
    np.testing.assert_array_equal(array, expected)


@WRITERS
def test_what_else_torch_writes_is_understood(tmp_path, write):
    ordered = call("collections", "OrderedDict") + value({"_metadata": {"": {"version": 1}}}) + b"b"
    pairs = b"](" + b"](" + value("w") + tensor() + b"ee"  # Python 2: OrderedDict([["w", tensor]])
    parts = {
        "parameter": call("torch._utils", "_rebuild_parameter", tensor(), value(True), value(None)),
        "old": call("torch._utils", "_rebuild_tensor", storage(), value(0), value((6,)), value((1,))),
        "metadata": tensor(None, 0, (6,), (1,), value({})),
        "ordered": ordered,
        "python 2": call("collections", "OrderedDict", pairs),
        "size": call("torch", "Size", value((2, 3))),
        "dtype": name("torch", "bfloat16"),
        "python 2 string": b"U\3abc",
        "list": value([1, 2.5, None, True, "x", (1, 2), 1 << 100]),
    }
    write(tmp_path / "w.pt", mapping(parts))
    with TorchCheckpoint(tmp_path / "w.pt") as checkpoint:
        root = checkpoint.root
        for key in ("parameter", "old", "metadata"):
            np.testing.assert_array_equal(root[key].read().ravel(), np.arange(6))
        assert root["ordered"] == {}
        assert isinstance(root["python 2"]["w"], TorchTensor)
        assert root["size"] == (2, 3)
        assert root["python 2 string"] == "abc"


def test_old_format_reference_has_an_empty_view(tmp_path):
    write_legacy(tmp_path / "w.pt", mapping({"w": tensor(storage("0", 6, "FloatStorage", value(None)))}))
    np.testing.assert_array_equal(read_one(tmp_path / "w.pt").ravel(), np.arange(6))


def test_leaf_is_read_without_the_rest_of_the_file(tmp_path):
    data = {str(i): np.full(1 << 18, i, np.float32).tobytes() for i in range(8)}
    parts = {f"w{key}": tensor(storage(key, 1 << 18), 0, (1 << 9, 1 << 9), (1 << 9, 1)) for key in data}
    write_zip(tmp_path / "w.pt", mapping(parts), data)
    tracemalloc.start()
    with TorchCheckpoint(tmp_path / "w.pt") as checkpoint:
        for key in data:
            assert checkpoint.root[f"w{key}"].read()[0, 0] == int(key)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * (1 << 20)


# Nothing is executed.


class Payload:
    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def make_payload(kind, target):
    code = f"open({str(target)!r}, 'w').close()"
    return {
        "os.system": Payload(os.system, f"touch {target}"),
        "exec": Payload(builtins.exec, code),
        "eval": Payload(builtins.eval, code),
        "open": Payload(open, str(target), "w"),
    }[kind]


@WRITERS
@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", ["os.system", "exec", "eval", "open"])
def test_malicious_pickle_is_refused_and_not_executed(tmp_path, write, protocol, kind):
    target, path = tmp_path / "executed", tmp_path / "evil.bin"
    bomb = pickle.dumps({"w": make_payload(kind, target)}, protocol)
    pickle.loads(bomb)
    assert target.exists(), "the payload works when it is executed"
    target.unlink()

    write(path, bomb[:-1])
    with pytest.raises(InputError, match=r"names '[a-z_]+\.(system|exec|eval|open)'.*NOT executed") as error:
        TorchCheckpoint(path)
    assert not target.exists()
    assert error.value.where == str(path) and "safetensors" in error.value.fix


@pytest.mark.parametrize("position", range(5))
def test_malicious_pickle_in_any_part_of_the_old_format_is_not_executed(tmp_path, position):
    target = tmp_path / "executed"
    parts = [pickle.dumps(item, 2) for item in (0x1950A86A20F9469CFC6C, 1001, {}, {}, [])]
    parts[position] = pickle.dumps(make_payload("os.system", target), 2)
    (tmp_path / "evil.bin").write_bytes(b"".join(parts))
    with pytest.raises(InputError):
        TorchCheckpoint(tmp_path / "evil.bin")
    assert not target.exists()


def bare(attribute):
    return name("torch._utils", attribute)


HOSTILE = {
    "class of torch": call("torch.nn.modules.linear", "Linear"),
    "loader of torch": call("torch.storage", "_load_from_bytes", value(b"x")),
    "dotted name through an allowed module": call("torch", "_utils.os.system", value("true")),
    "stack global of a list": value([]) + value("x") + b"\x93",
    "storage type is called": call("torch", "FloatStorage", value(3)),
    "dtype is called": call("torch", "float32"),
    "string is called": value("os.system") + pack(value("true")) + b"R",
    "tensor is called": tensor() + pack() + b"R",
    "call with a list": name("collections", "OrderedDict") + value([]) + b"R",
    "rebuild without arguments": call("torch._utils", "_rebuild_tensor_v2"),
    "rebuild of a string": tensor(value("0"), 0, (1,), (1,)),
    "rebuild with too many arguments": tensor(None, 0, (6,), (1,), value(None), value(None)),
    "conjugate bit": tensor(None, 0, (6,), (1,), value({"conj": True})),
    "parameter of a string": call("torch._utils", "_rebuild_parameter", value("w"), value(True), value({})),
    "OrderedDict of a string": call("collections", "OrderedDict", value("ab")),
    "OrderedDict of triples": call("collections", "OrderedDict", value([[1, 2, 3]])),
    "Size of strings": call("torch", "Size", value(("a",))),
    "state of a tensor": tensor() + value({"shape": (9,)}) + b"b",
    "state of a function": bare("_rebuild_tensor_v2") + value((None, {"__code__": 1})) + b"b",
    "object of an allowed class": name("collections", "OrderedDict") + b")\x81",
    "object by INST": b"(icollections\nOrderedDict\n",
    "object by OBJ": b"(" + name("collections", "OrderedDict") + b"o",
    "extension registry": b"\x82\1",
    "reference that is a string": value("storage") + b"Q",
    "reference by text": b"Pstorage\n",
    "reference to a module": pack(value("module"), value("x"), value("y"), value("z")) + b"Q",
    "reference with a view": storage("0", 6, "FloatStorage", value(("1", 0, 6))),
    "reference of an unknown type": pack(
        value("storage"), name("collections", "OrderedDict"), value("0"), value("cpu"), value(6)
    ) + b"Q",
    "key with a path": tensor(storage("../data.pkl")),
    "key that is no string": tensor(storage(0)),
    "key beyond ASCII": tensor(storage("٣")),
    "negative number of elements": tensor(storage("0", -6)),
    "huge number of elements": tensor(storage("0", 10**5000)),
    "two types of one storage": pack(tensor(), tensor(storage("0", 3, "DoubleStorage"))),
    "past the end": tensor(None, 1),
    "past the end by a stride": tensor(None, 0, (2, 2), (5, 1)),
    "negative offset": tensor(None, -1, (1,), (1,)),
    "negative size": tensor(None, 0, (-2, -3), (3, 1)),
    "negative stride": tensor(None, 5, (6,), (-1,)),
    "offset that is no integer": tensor(None, 0.0, (1,), (1,)),
    "strides of another length": tensor(None, 0, (2, 3), (1,)),
    "shape in a list": call(
        "torch._utils", "_rebuild_tensor", storage(), value(0), value([6]), value([1])
    ),
    "sizes whose product overflows": tensor(None, 0, (1 << 32, 1 << 32), (0, 0)),
    "expanded to 4 TiB": tensor(None, 0, (1 << 40,), (0,)),
    "empty beyond NumPy": tensor(None, 0, (0, 1 << 62), (0, 0)),
    "more axes than NumPy has": tensor(None, 0, (1,) * 100, (1,) * 100),
    "number without decimal form": tensor(None, 0, (10**5000,), (0,)),
    "empty stack": b"t",
    "unknown memo": b"h\7",
    "missing mark": b"u",
    "memo index of 32 bits": b"}r\xff\xff\xff\xff" + b"j\xfe\xff\xff\xff",
    "string longer than the file": b"\x8d" + struct.pack("<Q", 1 << 62),
    "bytes longer than the file": b"\x8e" + struct.pack("<Q", 1 << 40),
    "number longer than the file": b"\x8b" + struct.pack("<i", (1 << 31) - 1),
    "append to a dict": b"}" + value(1) + b"a",
    "item of a list": b"]" + value(1) + value(2) + b"s",
    "items in odd number": b"}(" + value(1) + b"u",
    "key that is a list": b"}]]s",
    "key that nests without end": b"}" + b")" + b"\x85" * 200_000 + b"Ns",
    "unknown instruction": b"\xf0",
    "set": value({1}),
}


@WRITERS
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickle_is_refused(tmp_path, write, kind):
    path = tmp_path / "evil.bin"
    write(path, HOSTILE[kind])
    with pytest.raises(InputError, match="executed") as error:
        TorchCheckpoint(path)
    assert error.value.where == str(path) and error.value.fix


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_pickle_beyond_the_limits_is_refused(tmp_path, monkeypatch, write):
    monkeypatch.setattr(torch_pickle, "_MAX_INSTRUCTIONS", 1000)
    write(tmp_path / "long.bin", b"}" * 1001, {})
    with pytest.raises(InputError, match="more than 1000 instructions"):
        TorchCheckpoint(tmp_path / "long.bin")
    monkeypatch.setattr(torch_pickle, "_MAX_PICKLE_BYTES", 5000)
    write(tmp_path / "large.bin", value("x" * 5000), {})
    with pytest.raises(InputError, match="data.pkl has|pickle"):
        TorchCheckpoint(tmp_path / "large.bin")


def test_pickle_that_contains_itself_is_read(tmp_path):
    write_zip(tmp_path / "w.pt", b"}q\7" + value("self") + b"h\7s", {})
    with TorchCheckpoint(tmp_path / "w.pt") as checkpoint:
        assert checkpoint.root["self"] is checkpoint.root


# Broken containers.


def refuse(path, match):
    with pytest.raises(InputError, match=match) as error:
        TorchCheckpoint(path)
    assert error.value.where == str(path)


def test_archive_with_missing_or_short_data_is_refused(tmp_path):
    write_zip(tmp_path / "missing.pt", mapping({"w": tensor()}), {})
    refuse(tmp_path / "missing.pt", "storage 0 has 0 bytes, not 24")
    write_zip(tmp_path / "short.pt", mapping({"w": tensor()}), {"0": b"\0" * 23})
    refuse(tmp_path / "short.pt", "storage 0 has 23 bytes, not 24")


def test_archive_of_unknown_form_is_refused(tmp_path):
    parts = mapping({"w": tensor()})
    write_zip(tmp_path / "two.pt", parts, **{"other/data.pkl": finish(parts)})
    refuse(tmp_path / "two.pt", "2 data.pkl")
    write_zip(tmp_path / "nested.pt", parts, folder="archive/inner")
    refuse(tmp_path / "nested.pt", "0 data.pkl")
    write_zip(tmp_path / "script.pt", parts, **{"archive/constants.pkl": b"x"})
    refuse(tmp_path / "script.pt", "TorchScript")
    write_zip(tmp_path / "order.pt", parts, byteorder=b"middle")
    refuse(tmp_path / "order.pt", "byteorder")
    with pytest.warns(UserWarning, match="Duplicate"):
        write_zip(tmp_path / "twice.pt", parts, **{"archive/data/0": DATA["0"]})
    refuse(tmp_path / "twice.pt", "same name")


@pytest.mark.parametrize("compressed", ["archive/data.pkl", "archive/data/0"])
def test_compressed_archive_is_refused(tmp_path, compressed):
    path = tmp_path / "w.pt"
    contents = {"archive/data.pkl": finish(mapping({"w": tensor()})), "archive/data/0": DATA["0"]}
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in contents.items():
            kind = zipfile.ZIP_DEFLATED if file == compressed else zipfile.ZIP_STORED
            archive.writestr(file, content, kind)
    refuse(path, f"'{compressed}' is compressed")


def test_directory_that_points_elsewhere_is_refused(tmp_path):
    path = tmp_path / "w.pt"
    write_zip(path, mapping({"w": tensor()}))
    data = bytearray(path.read_bytes())
    last = data.rindex(b"PK\1\2")  # entry of archive/data/0 in the directory: its position is at 42
    data[last + 42 : last + 46] = struct.pack("<I", 3)
    path.write_bytes(data)
    refuse(path, "not where the archive says")


def test_old_format_with_other_keys_or_sizes_is_refused(tmp_path):
    parts = mapping({"w": tensor()})
    write_legacy(tmp_path / "keys.pt", parts, keys=["1"])
    refuse(tmp_path / "keys.pt", "does not fit its tensors")
    write_legacy(tmp_path / "none.pt", parts, keys=[])
    refuse(tmp_path / "none.pt", "does not fit its tensors")
    write_legacy(tmp_path / "odd.pt", parts, keys={"0": 1})
    refuse(tmp_path / "odd.pt", "list of storages")
    write_legacy(tmp_path / "size.pt", parts, itemsize=8)
    refuse(tmp_path / "size.pt", "3 elements, not 6")


@pytest.mark.parametrize(
    "content", [b"<!DOCTYPE html>", pickle.dumps({"w": 1}, 2), b"\x80", b"PK\3\4", b"\0" * 100]
)
def test_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "w.pt").write_bytes(content)
    refuse(tmp_path / "w.pt", "unknown file")


@WRITERS
def test_every_truncation_is_refused(tmp_path, write):
    write(tmp_path / "whole.pt", mapping({"w": tensor()}))
    data = (tmp_path / "whole.pt").read_bytes()
    for size in range(len(data)):
        (tmp_path / "cut.pt").write_bytes(data[:size])
        with pytest.raises(InputError, match="cut.pt"):
            TorchCheckpoint(tmp_path / "cut.pt")


@WRITERS
def test_damage_is_refused_or_leaves_readable_tensors(tmp_path, write):
    parts = {"w": tensor(), "t": tensor(None, 0, (3, 2), (1, 3)), "epoch": value(3)}
    write(tmp_path / "whole.pt", mapping(parts))
    whole = (tmp_path / "whole.pt").read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for _ in range(500):
        data = bytearray(whole)
        for position in rng.integers(0, len(data), rng.integers(1, 4)):
            data[position] = rng.integers(256)
        (tmp_path / "damaged.pt").write_bytes(data)
        try:
            with TorchCheckpoint(tmp_path / "damaged.pt") as checkpoint:
                found = checkpoint.root.values() if isinstance(checkpoint.root, dict) else ()
                for item in found:
                    if isinstance(item, TorchTensor):
                        assert item.read().shape == item.shape
        except InputError:
            refused += 1
    assert refused > 100


# What PyTorch itself writes.


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_torch_save_round_trip_bitwise(tmp_path, zipped, protocol):
    import torch

    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    shared = torch.randn(10, 4, generator=generator).bfloat16()
    dtypes = "float64 float16 int64 int32 int16 int8 uint8 bool".split()  # noqa: SIM905
    tensors = {dtype: torch.arange(6).reshape(2, 3).to(getattr(torch, dtype)) for dtype in dtypes}
    tensors |= {
        "plain": base,
        "transposed": base.T,
        "sliced": base[1:5:2, 2:7],
        "expanded": base[:1].expand(5, 8),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "shared 0": shared[:4],
        "shared 1": shared[4:].T,
        "parameter": torch.nn.Parameter(base * 2),
        "window of a window": base.unfold(1, 3, 2),
    }
    path = tmp_path / "w.pt"
    torch.save(tensors, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    with TorchCheckpoint(path) as checkpoint:
        assert checkpoint.root.keys() == tensors.keys()
        for key, ours in checkpoint.root.items():
            theirs = tensors[key].detach()
            bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[theirs.element_size()]
            assert ours.shape == tuple(theirs.shape), key
            assert f"torch.{ours.dtype}" == str(theirs.dtype), key
            expected = theirs.contiguous().view(bits).numpy()
            np.testing.assert_array_equal(ours.read().view(expected.dtype), expected, err_msg=key)


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False])
def test_training_checkpoint_of_torch_is_read(tmp_path, zipped):
    import torch

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(torch.zeros(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    saved = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "dtype": torch.half}
    torch.save(saved, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with TorchCheckpoint(tmp_path / "w.pth") as checkpoint:
        for key, expected in model.state_dict().items():
            array = checkpoint.root["state_dict"][key].read()
            assert array.shape == tuple(expected.shape)
            np.testing.assert_array_equal(array, expected.numpy(), err_msg=key)


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False])
def test_whole_module_of_torch_is_refused(tmp_path, zipped):
    import torch

    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    refuse(tmp_path / "w.pt", "torch.nn.modules.linear.Linear.*NOT executed")


@pytest.mark.torch
def test_torchscript_is_refused(tmp_path):
    import torch

    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "w.pt"))
    refuse(tmp_path / "w.pt", "TorchScript")
