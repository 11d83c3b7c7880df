"""torchscript: tensors out of what torch.jit wrote, under their names, and nothing executed."""

import struct
import zipfile

import numpy as np
import pytest
from test_torch_pickle import DATA, call, finish, mapping, name, tensor, value, write_zip

from animecolor_jax.convert import torchscript
from animecolor_jax.convert.state_dict import open_state_dict
from animecolor_jax.convert.torch_pickle import TorchCheckpoint
from animecolor_jax.convert.torchscript import Container, TorchScriptArchive, is_torchscript
from animecolor_jax.errors import InputError


def made(kind, fields):
    """Instructions of an object of the class `kind` of the archive's program."""
    module, _, attribute = f"__torch__.{kind}".rpartition(".")
    return name(module, attribute) + b")\x81" + mapping(fields) + b"b"


def write_script(path, instructions, data=DATA, code=b"", **extra):
    entries = {"archive/constants.pkl": finish(value(())), "archive/code/__torch__.py": code}
    write_zip(path, instructions, data, **{**entries, **extra})


def refuse(path, match):
    with pytest.raises(InputError, match=match) as error:
        TorchScriptArchive(path)
    assert error.value.where == str(path) and error.value.fix


def test_tensors_have_the_dotted_names_of_their_modules(tmp_path):
    row = tensor(None, 3, (3,), (1,))
    fields = {"weight": tensor(), "training": value(False)}
    conv = made("torch.nn.modules.conv.___torch_mangle_0.Conv3d", fields)
    branch = made("torch.nn.modules.container.Sequential", {"0": conv, "1": made("src.Unit", {"bias": row})})
    write_script(tmp_path / "w.pt", made("src.net.I3D", {"scale": row, "training": value(True), "b": branch}))
    assert is_torchscript(tmp_path / "w.pt")
    with open_state_dict(tmp_path / "w.pt") as state:
        assert list(state) == ["scale", "b.0.weight", "b.1.bias"]
        assert state.spec("b.0.weight") == ((2, 3), np.float32)
        np.testing.assert_array_equal(state.read("b.0.weight"), [[0, 1, 2], [3, 4, 5]])
        np.testing.assert_array_equal(state.read("b.1.bias"), [3, 4, 5])
        assert state.sources == [tmp_path / "w.pt"]


def test_lists_and_dicts_of_tensors_are_named_by_index_and_key(tmp_path):
    build = call("torch.jit._pickle", "build_tensorlist", b"](" + tensor() + tensor() + b"e")
    tagged = mapping({"a": tensor()}), value("Dict[str, Tensor]")
    typed = call("torch.jit._pickle", "restore_type_tag", *tagged)
    numbers = call("torch.jit._pickle", "build_intlist", value([1, 2]))
    write_script(tmp_path / "w.pt", made("N", {"list": build, "dict": typed, "numbers": numbers}))
    with TorchScriptArchive(tmp_path / "w.pt") as archive:
        assert list(archive.tensors) == ["list.0", "list.1", "dict.a"]
        assert archive.root.fields["numbers"] == [1, 2]


def test_shared_module_is_listed_under_each_of_its_names(tmp_path):
    unit = made("U", {"w": tensor()}) + b"q\x63"
    write_script(tmp_path / "w.pt", made("N", {"a": unit, "b": b"h\x63"}))
    with TorchScriptArchive(tmp_path / "w.pt") as archive:
        assert list(archive.tensors) == ["a.w", "b.w"]


def test_objects_are_containers_without_behaviour(tmp_path):
    write_script(tmp_path / "w.pt", made("os.system", {"__class__": value("x"), "read": tensor()}))
    with TorchScriptArchive(tmp_path / "w.pt") as archive:
        assert type(archive.root) is Container and archive.root.kind == "__torch__.os.system"
        assert archive.root.fields == {"__class__": "x", "read": archive.tensors["read"]}


def test_code_is_text_and_is_never_run(tmp_path):
    bomb = f"open({str(tmp_path / 'executed')!r}, 'w')".encode()
    write_script(tmp_path / "w.pt", made("N", {"w": tensor()}), code=bomb)
    with TorchScriptArchive(tmp_path / "w.pt") as archive:
        archive.tensors["w"].read()
        assert archive.read_code() == bomb.decode()
    assert not (tmp_path / "executed").exists()


def test_what_is_no_archive_of_torchscript_is_told_apart(tmp_path):
    write_zip(tmp_path / "state.pt", mapping({"w": tensor()}))
    (tmp_path / "text.pt").write_text("PK")
    assert not any(is_torchscript(tmp_path / file) for file in ("state.pt", "text.pt", "missing.pt"))
    with open_state_dict(tmp_path / "state.pt") as state:
        assert list(state) == ["w"]
    refuse(tmp_path / "state.pt", "no TorchScript archive")
    with pytest.raises(InputError, match="No such file"):
        open_state_dict(tmp_path / "missing.pt")


SELF = name("__torch__", "N") + b")\x81q\x63" + mapping({"self": b"h\x63"}) + b"b"
HOSTILE = {
    "function of the system": (call("os", "system", value("true")), "names 'os.system'.*NOT executed"),
    "function in an object": (made("N", {"w": call("builtins", "eval", value("1"))}), "NOT executed"),
    "system through the program": (call("__torch__.os", "system", value("true")), "it calls __torch__"),
    "class of the program is called": (call("__torch__", "N"), "it calls __torch__.N"),
    "object of another class": (name("torch.nn.modules.linear", "Linear") + b")\x81", "NOT executed"),
    "object of a known function": (name("torch._utils", "_rebuild_tensor_v2") + b")\x81", "makes an object"),
    "object of a string": (value("__torch__.N") + b")\x81", "object of a str"),
    "object with arguments": (name("__torch__", "N") + value((1,)) + b"\x81", "makes an object"),
    "name that leaves the program": (name("__torch__..os", "system"), "NOT executed"),
    "name with a slash": (name("__torch__/../os", "system"), "NOT executed"),
    "state of a tensor": (tensor() + value({"shape": (9,)}) + b"b", "sets the state of a TorchTensor"),
    "state twice": (made("N", {"a": value(1)}) + mapping({"a": value(2)}) + b"b", "twice"),
    "instance by INST": (b"(i__torch__\nN\n", "makes an object"),
    "typed string": (call("torch.jit._pickle", "restore_type_tag", value("x"), value("str")), "typed list"),
    "list of a string": (call("torch.jit._pickle", "build_intlist", value("x")), "a list of unknown form"),
    "other function of jit": (call("torch.jit._pickle", "build_tensor_from_id", value(1)), "NOT executed"),
    "unknown module of jit": (call("torch.jit._script", "script", value(1)), "NOT executed"),
    "function in a tensor": (made("N", {"w": tensor(call("os", "system", value("x")))}), "NOT executed"),
    "module that contains itself": (SELF, "contain each other"),
    "two tensors of one name": (
        made("N", {"a.b": tensor(), "a": made("M", {"b": tensor()})}), "two tensors are called 'a.b'"
    ),
    "dict at the top": (mapping({"w": tensor()}), "it holds a dict, not a module"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archive_is_refused(tmp_path, kind):
    instructions, match = HOSTILE[kind]
    write_script(tmp_path / "evil.pt", instructions)
    refuse(tmp_path / "evil.pt", match)
    with pytest.raises(InputError, match=match):
        open_state_dict(tmp_path / "evil.pt")


def test_modules_that_multiply_are_refused_in_little_time(tmp_path, monkeypatch):
    monkeypatch.setattr(torchscript, "_MAX_VALUES", 10_000)
    memo = lambda level: struct.pack("<I", 1000 + level)  # noqa: E731
    nested = value([]) + b"r" + memo(0)
    for level in range(40):  # each list holds the one before twice: 2^40 ways to the innermost
        nested = b"(" + nested + b"j" + memo(level) + b"l" + b"r" + memo(level + 1)
    write_script(tmp_path / "evil.pt", made("N", {"lists": nested}))
    refuse(tmp_path / "evil.pt", "contain each other")


def test_deep_nesting_is_refused(tmp_path):
    write_script(tmp_path / "evil.pt", made("N", {"lists": b"]" * 100 + b"a" * 99}))
    refuse(tmp_path / "evil.pt", "contain each other")


def test_missing_data_is_refused(tmp_path):
    write_script(tmp_path / "w.pt", made("N", {"w": tensor()}), {})
    refuse(tmp_path / "w.pt", "storage 0 has 0 bytes, not 24")


def test_code_that_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torchscript, "_MAX_CODE_BYTES", 1 << 20)
    write_script(tmp_path / "w.pt", made("N", {"w": tensor()}))
    with zipfile.ZipFile(tmp_path / "w.pt", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/code/more.py", b" " * (2 << 20))
    with TorchScriptArchive(tmp_path / "w.pt") as archive, pytest.raises(InputError, match="1048576 bytes"):
        archive.read_code()


def make_network():
    """A network with what TorchScript stores in a way of its own."""
    import torch

    class Unit(torch.nn.Module):
        def __init__(self, channels, out_channels):
            super().__init__()
            self.conv3d = torch.nn.Conv3d(channels, out_channels, 3, bias=False)
            self.batch3d = torch.nn.BatchNorm3d(out_channels, eps=1e-3)
            self.sizes = [1, 2]
            self.names: dict[str, int] = {"a": 1}

        def forward(self, x):
            return torch.relu(self.batch3d(self.conv3d(x))) * self.sizes[0] + self.names["a"]

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = Unit(3, 4)
            self.rest = torch.nn.Sequential(Unit(4, 5), torch.nn.Identity(), torch.nn.Conv3d(5, 2, 1))
            self.register_buffer("steps", torch.arange(3))
            self.small = torch.nn.Parameter(torch.randn(2, 2).half())
            self.tied = self.first

        def forward(self, x):
            return self.rest(self.tied(x)) + self.small.float().sum() + self.steps.sum()

    torch.manual_seed(0)
    return Network().eval()


@pytest.mark.torch
@pytest.mark.parametrize("how", ["script", "trace"])
def test_what_torch_saved_has_the_tensors_of_its_state_dict(tmp_path, how):
    import torch

    network = make_network()
    if how == "script":
        saved = torch.jit.script(network)
    else:
        saved = torch.jit.trace(network, torch.zeros(1, 3, 5, 6, 6))
    saved.save(str(tmp_path / "network.pt"))
    expected = torch.jit.load(str(tmp_path / "network.pt")).state_dict()
    with open_state_dict(tmp_path / "network.pt") as state:
        assert set(state) == set(expected) >= {"rest.0.conv3d.weight", "tied.batch3d.bias"}
        for key, weight in expected.items():
            np.testing.assert_array_equal(state.read(key), weight.numpy(), err_msg=key)
    with TorchScriptArchive(tmp_path / "network.pt") as archive:
        assert "batch_norm" in archive.read_code()
        assert archive.root.fields["rest"].kind.endswith("Sequential")


@pytest.mark.torch
def test_checkpoint_reader_still_refuses_a_program(tmp_path):
    import torch

    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "w.pt"))
    with pytest.raises(InputError, match="TorchScript"):
        TorchCheckpoint(tmp_path / "w.pt")


@pytest.mark.torch
def test_frozen_network_is_refused(tmp_path):
    import torch

    torch.jit.freeze(torch.jit.script(torch.nn.Linear(2, 2).eval())).save(str(tmp_path / "w.pt"))
    with pytest.raises(InputError, match="frozen"):
        open_state_dict(tmp_path / "w.pt")
