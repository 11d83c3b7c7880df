"""The tensors of a TorchScript archive (what `torch.jit.save` writes), without PyTorch or its code.

Beside the pickle of a checkpoint such an archive holds a program (code/) and its constants. The pickle
names classes of that program, such as `__torch__.torch.nn.modules.conv.Conv3d`, and makes objects of them.
Here an object is a `Container`, a bag of fields without behaviour; the program is never run.
Source: PyTorch torch/csrc/jit/serialization/pickler.cpp (what is written), torch/jit/_pickle.py.
"""

import re
import zipfile
import zlib
from dataclasses import dataclass, field

from animecolor_jax.convert.torch_pickle import Name, PickleMachine, TorchCheckpoint, TorchTensor
from animecolor_jax.errors import InputError

_CLASS = re.compile(r"__torch__(\.\w+)+", re.ASCII)
_LISTS = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist")

# Bounds of a hostile archive: modules that contain each other without end, code that unpacks without end.
_MAX_VALUES = 1_000_000
_MAX_DEPTH = 64
_MAX_CODE_BYTES = 16 << 20


@dataclass
class Container:
    """An object of a class of the archive's program: its class's name and its fields, nothing else."""

    kind: str
    fields: dict = field(default_factory=dict)


class _ScriptMachine(PickleMachine):
    """A `PickleMachine` that also makes containers of the classes under `__torch__`."""

    def __init__(self, where, **kwargs):
        super().__init__(where, **kwargs)
        self._calls["torch.jit._pickle.restore_type_tag"] = self._typed
        self._calls |= {f"torch.jit._pickle.{name}": self._list for name in _LISTS}

    def resolve(self, name):
        return Name(name) if _CLASS.fullmatch(name) else super().resolve(name)

    def make(self, name, args):
        if not _CLASS.fullmatch(name) or args:
            return super().make(name, args)
        return Container(name)

    def build(self, target, state):
        if type(target) is not Container:
            return super().build(target, state)
        if target.fields:
            raise self.damaged(f"it sets the state of a {target.kind} twice")
        # a class with a __getstate__ of its own saves any value
        target.fields = state if type(state) is dict else {"state": state}
        return target

    def _typed(self, args):
        match args:
            case (list() | dict() as value, str()):
                return value
        raise self.damaged("a typed list or dict of unknown form")

    def _list(self, args):
        match args:
            case (list() as value,):
                return value
        raise self.damaged("a list of unknown form")


class TorchScriptArchive(TorchCheckpoint):
    """An open TorchScript archive; a context manager.

    Attributes:
        root: the saved module, a `Container`.
        tensors: {dotted name: TorchTensor} of every tensor in the module and the modules in it, in the
            order of the file: its parameters and buffers, under the names of its state dict.
    Raises:
        InputError: the file is damaged, no TorchScript archive, or its pickle asks for anything but objects
            of its own program, plain data and tensors, or it holds none; nothing of it was executed.
    """

    machine = _ScriptMachine

    def __init__(self, path):
        super().__init__(path)
        try:
            self.tensors = self._find_tensors()
        except InputError:
            self.close()
            raise

    def read_code(self):
        """The text of the archive's program, all its files one after another, as text only."""
        texts, left = [], _MAX_CODE_BYTES
        try:
            with zipfile.ZipFile(self._file) as archive:
                for entry in archive.infolist():
                    if re.fullmatch(r"[^/]+/code/.+\.py", entry.filename):
                        with archive.open(entry) as file:
                            texts.append(file.read(left + 1))
                        left -= len(texts[-1])
                        if left < 0:
                            raise self._damaged(f"its code has more than {_MAX_CODE_BYTES} bytes")
        except (zipfile.BadZipFile, RuntimeError, OSError, EOFError, zlib.error) as error:
            raise self._damaged(f"its code: {str(error)[:200]}") from error
        return b"\n".join(texts).decode("utf-8", "replace")

    def _check_entries(self, entries, folder):
        if f"{folder}constants.pkl" not in entries:
            raise self._damaged("no TorchScript archive")

    def _find_tensors(self):
        if type(self.root) is not Container:
            raise self._damaged(f"it holds a {type(self.root).__name__}, not a module")
        tensors, seen = {}, 0

        def visit(value, path, inside):
            nonlocal seen
            seen += 1
            if seen > _MAX_VALUES or len(path) > _MAX_DEPTH or id(value) in inside:
                raise self._damaged("its modules contain each other without end")
            if type(value) is TorchTensor:
                name = ".".join(path)
                if name in tensors:
                    raise self._damaged(f"two tensors are called {name[:200]!r}")
                tensors[name] = value
                return
            for key, item in _items(value):
                visit(item, (*path, str(key)), inside | {id(value)})

        visit(self.root, (), frozenset())
        if not tensors:
            raise InputError(
                "no tensor in its modules: a frozen program has them as nameless constants",
                where=self._where, expected="an archive of a module with its parameters",
                fix="use the file as it was published",
            )
        return tensors


def is_torchscript(path):
    """Whether a file is a zip archive that holds a TorchScript program; False where it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(re.fullmatch("[^/]+/constants.pkl", name) for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError):
        return False


def _items(value):
    """(name, value) of what lies in a value."""
    if type(value) is Container:
        return value.fields.items()
    if type(value) is dict:
        return value.items()
    return enumerate(value) if type(value) in (list, tuple) else ()
