"""PyTorch checkpoints (.bin, .pt, .pth) without PyTorch, and without executing anything in them.

A pickle is a program: an ordinary unpickler imports and calls whatever it names. Here `pickletools`
decodes the instructions and carries none out; `PickleMachine` carries out those that build plain
data. A class or function in the pickle becomes a `Name`, a token that cannot be called: calling it
looks it up among a few methods of the machine, which describe tensors. All else is refused. Data is
read when a tensor is asked for.

Source: pickletools (the instructions); torch/serialization.py, `_save` and `_legacy_save` (the two
formats); torch/_utils.py, `_rebuild_tensor_v2` (what a tensor is).
"""

import io
import math
import os
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from animecolor_jax.errors import InputError
from animecolor_jax.safetensors_io import DTYPES, is_shape, open_weights, read_into

_STORAGES = {
    "torch.DoubleStorage": DTYPES["F64"],
    "torch.FloatStorage": DTYPES["F32"],
    "torch.HalfStorage": DTYPES["F16"],
    "torch.BFloat16Storage": DTYPES["BF16"],
    "torch.LongStorage": DTYPES["I64"],
    "torch.IntStorage": DTYPES["I32"],
    "torch.ShortStorage": DTYPES["I16"],
    "torch.CharStorage": DTYPES["I8"],
    "torch.ByteStorage": DTYPES["U8"],
    "torch.BoolStorage": DTYPES["BOOL"],
    "torch.storage.UntypedStorage": DTYPES["U8"],
}
_TORCH_DTYPES = {f"torch.{dtype}" for dtype in DTYPES.values()}  # may lie beside a state dict
_LEGACY_START = [0x1950A86A20F9469CFC6C, 1001]  # magic number, version

# instructions that push a fixed value, and those that push the value they carry
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {
    "BININT", "BININT1", "BININT2", "INT", "LONG1", "LONG4", "LONG", "BINFLOAT", "FLOAT",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINSTRING", "SHORT_BINSTRING", "STRING",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE",
}  # fmt: skip

# The pickle of a state dict has a few hundred bytes per tensor. The limits bound the memory that a
# hostile one can take.
_MAX_PICKLE_BYTES = 64 << 20
_MAX_INSTRUCTIONS = 5_000_000
_MAX_EXPANDED_BYTES = 1 << 30  # of a tensor larger than its file, which repeats its elements

_USE_SAFETENSORS = "download or copy the file again, or use the safetensors of the same weights"
_SAVE_AGAIN = (
    "only if you trust where the file came from, save its tensors as safetensors: "
    'python -c "import torch; from safetensors.torch import save_file; '
    "d = torch.load('FILE', weights_only=False); d = d.get('state_dict', d); "
    "save_file({k: v.contiguous().clone() for k, v in d.items()}, 'FILE.safetensors')\""
)


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names. Never the object itself."""

    name: str


@dataclass
class Storage:
    """A stretch of elements in the file; `offset` is its first byte, once that is known."""

    key: str
    dtype: np.dtype
    numel: int
    offset: int | None = None

    @property
    def nbytes(self):
        """Bytes of the elements."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class TorchTensor:
    """A tensor in a checkpoint: a strided view of a storage, counted in elements."""

    storage: Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    reader: Callable = field(repr=False)

    @property
    def dtype(self):
        """NumPy dtype (bfloat16 is that of ml_dtypes)."""
        return self.storage.dtype

    @property
    def span(self):
        """Elements from the first to the last that the tensor touches."""
        steps = zip(self.shape, self.strides, strict=True)
        return 0 if 0 in self.shape else 1 + sum((size - 1) * stride for size, stride in steps)

    def read(self):
        """The tensor, a new contiguous array; reads only its span of the storage."""
        return self.reader(self)


class PickleMachine:
    """Carries out the instructions of a pickle that make numbers, strings, containers and tensors.

    Values on the stack are never called, and no attribute of one is ever set: `resolve`, `call`,
    `make`, `build` and `persistent` say what the instructions for that stand for.

    Attributes:
        storages: {key: Storage} that the pickle refers to; the caller fills in their offsets.
    """

    def __init__(self, where, *, file_size, reader):
        """`reader(tensor)` is what reads a tensor's data."""
        self.where = where
        self.storages = {}
        self._file_size = file_size
        self._reader = reader
        self._calls = {
            "collections.OrderedDict": self._ordered_dict,
            "torch.Size": self._size,
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": self._parameter,
        }

    def run(self, stream):
        """The value of the pickle at the stream's position, which moves to its end.

        Raises:
            InputError: it is damaged, too large, or asks for anything but plain data.
        """
        try:
            return self._run(stream)
        except (IndexError, KeyError) as error:  # an empty stack, an unknown memo
            raise self.damaged("it uses a value that it has not made") from error

    def resolve(self, name):
        """The `Name` of a storage, of a dtype, or of a function that makes tensors."""
        if name in self._calls or name in _STORAGES or name in _TORCH_DTYPES:
            return Name(name)
        raise InputError(
            f"the pickle names {name[:200]!r}, no part of plain tensors; it was NOT executed",
            where=self.where,
            expected="tensors in dicts",
            fix=_SAVE_AGAIN,
        )

    def call(self, name, args):
        """What calling the resolved `name` with the tuple `args` stands for."""
        if name not in self._calls:
            raise self.damaged(f"it calls {name}")
        return self._calls[name](args)

    def make(self, name, args):
        """What an object of the resolved class `name` stands for: no tensor needs one."""
        raise self.damaged(f"it makes an object of {name}")

    def build(self, target, state):
        """Drops the state of an OrderedDict: torch's `_metadata`, the versions of modules."""
        if type(target) is not dict:
            raise self.damaged(f"it sets the state of a {type(target).__name__}")
        return target

    def persistent(self, reference):
        """The `Storage` for ("storage", type, key, device, numel); the old format adds None."""
        match reference:
            case ("storage", Name(kind), str(key), str(), numel, *view) if view in ([], [None]):
                if kind in _STORAGES and re.fullmatch("[0-9]{1,20}", key) and _are_counts([numel]):
                    storage = Storage(key, _STORAGES[kind], numel)
                    if self.storages.setdefault(key, storage) == storage:
                        return self.storages[key]
        raise self.damaged("a reference to a storage of unknown form")

    def damaged(self, what):
        """The error for a pickle that no torch.save wrote."""
        return InputError(
            f"damaged or hostile pickle: {what}; nothing was executed",
            where=self.where,
            expected="a pickle as torch.save writes it",
            fix=_USE_SAFETENSORS,
        )

    def _run(self, stream):
        stack, outer, memo = [], [], {}
        for instruction, arg in self._instructions(stream):
            match instruction:
                case "BINPUT" | "LONG_BINPUT" | "PUT":
                    memo[arg] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET" | "GET":
                    stack.append(memo[arg])
                case literal if literal in _LITERALS:
                    stack.append(arg)
                case constant if constant in _CONSTANTS:
                    stack.append(_CONSTANTS[constant])
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    items = [stack.pop() for _ in range(int(instruction[-1]))]
                    stack.append(tuple(reversed(items)))
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_DICT":
                    stack.append({})
                case "MARK":
                    outer.append(stack)
                    stack = []
                case "TUPLE":
                    items, stack = stack, outer.pop()
                    stack.append(tuple(items))
                case "LIST":
                    items, stack = stack, outer.pop()
                    stack.append(items)
                case "DICT":
                    items, stack = stack, outer.pop()
                    stack.append({})
                    self._update(stack[-1], items)
                case "APPENDS":
                    items, stack = stack, outer.pop()
                    self._extend(stack[-1], items)
                case "APPEND":
                    item = stack.pop()
                    self._extend(stack[-1], [item])
                case "SETITEMS":
                    items, stack = stack, outer.pop()
                    self._update(stack[-1], items)
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    self._update(stack[-1], [key, value])
                case "BINPERSID":
                    stack.append(self.persistent(stack.pop()))
                case "GLOBAL":
                    stack.append(self.resolve(arg.replace(" ", ".")))
                case "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    if type(module) is not str or type(name) is not str:
                        raise self.damaged("a name is not a string")
                    stack.append(self.resolve(f"{module}.{name}"))
                case "REDUCE":
                    args, function = stack.pop(), stack.pop()
                    if type(function) is not Name or type(args) is not tuple:
                        raise self.damaged(f"it calls a {type(function).__name__}")
                    stack.append(self.call(function.name, args))
                case "NEWOBJ":
                    args, cls = stack.pop(), stack.pop()
                    if type(cls) is not Name or type(args) is not tuple:
                        raise self.damaged(f"it makes an object of a {type(cls).__name__}")
                    stack.append(self.make(cls.name, args))
                case "BUILD":
                    state, target = stack.pop(), stack.pop()
                    stack.append(self.build(target, state))
                case "INST":  # names a class and makes an object of it, which no tensor needs
                    self.resolve(arg.replace(" ", "."))
                    raise self.damaged("it makes an object")
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case _:
                    raise self.damaged(f"instruction {instruction}, which tensors do not need")

    def _instructions(self, stream):
        """(name, argument) of every instruction, the errors of decoding as InputError."""
        try:
            for count, (opcode, arg, _) in enumerate(pickletools.genops(_Bounded(stream))):
                if count == _MAX_INSTRUCTIONS:
                    raise ValueError(f"more than {_MAX_INSTRUCTIONS} instructions")
                yield opcode.name, arg
        except ValueError as error:
            raise self.damaged(str(error)[:200]) from error

    def _extend(self, target, items):
        if type(target) is not list:
            raise self.damaged(f"it appends to a {type(target).__name__}")
        target.extend(items)

    def _update(self, target, items):
        keys, values = items[::2], items[1::2]
        if type(target) is not dict or len(keys) != len(values):
            raise self.damaged(f"it sets items of a {type(target).__name__}")
        # not tuples: one that nests too deeply overflows the C stack when it is hashed
        if not all(isinstance(key, str | int | float | bytes | None) for key in keys):
            raise self.damaged("the key of a dict is neither a string nor a number")
        target.update(zip(keys, values, strict=True))

    def _ordered_dict(self, args):
        match args:
            case ():
                return {}
            case (list(pairs),) if all(type(pair) is list and len(pair) == 2 for pair in pairs):
                items = {}  # as Python 2 wrote it
                self._update(items, [item for pair in pairs for item in pair])
                return items
        raise self.damaged("an OrderedDict of unknown form")

    def _size(self, args):
        match args:
            case (tuple(sizes),) if _are_counts(sizes):
                return sizes
        raise self.damaged("a torch.Size of unknown form")

    def _tensor(self, args):
        match args:
            case (Storage() as storage, start, tuple(shape), tuple(strides), *rest):
                numbers = (start, *shape, *strides)
            case _:
                raise self.damaged("a tensor of unknown form")
        if len(rest) > 3 or (len(rest) == 3 and rest[2]):  # requires_grad, hooks, metadata
            raise self.damaged("a tensor of unknown form, or with the conjugate or negative bit")
        if not _are_counts(numbers) or not is_shape(shape) or len(shape) != len(strides):
            raise self.damaged("a tensor with impossible shape, strides or offset")
        tensor = TorchTensor(storage, start, shape, strides, self._reader)
        if tensor.span and start + tensor.span > storage.numel:
            raise self.damaged(
                f"a tensor of shape {list(shape)} needs elements {start} to {start + tensor.span} "
                f"of storage {storage.key}, which has {storage.numel}"
            )
        nbytes = math.prod(shape) * tensor.dtype.itemsize
        if nbytes > max(self._file_size, _MAX_EXPANDED_BYTES):
            raise self.damaged(f"a tensor of shape {list(shape)} is larger than its file")
        return tensor

    def _parameter(self, args):
        match args:
            case (TorchTensor() as tensor, _, _):
                return tensor
        raise self.damaged("a parameter of unknown form")


class _Bounded:
    """The start of a stream, so that no length in a pickle reserves more memory than that."""

    def __init__(self, stream):
        self._stream, self._left = stream, _MAX_PICKLE_BYTES

    def read(self, size):
        return self._count(self._stream.read(min(size, self._left)))

    def readline(self):
        return self._count(self._stream.readline(self._left))

    def _count(self, data):
        self._left -= len(data)
        return data


class TorchCheckpoint:
    """An open PyTorch checkpoint; a context manager.

    Reads zip archives (torch >= 1.6) and the format before that.

    Attributes:
        root: what was saved: a TorchTensor, or dicts, lists, tuples, numbers and strings with
            TorchTensors among them. It may contain itself.
    Raises:
        InputError: the file is missing, truncated or damaged, or names a class or function other
            than those of plain tensors.
    """

    machine = PickleMachine

    def __init__(self, path):
        self._where = str(path)
        self._file = open_weights(path)
        self._file_size = os.fstat(self._file.fileno()).st_size
        self._byteswap = False
        try:
            machine = self.machine(self._where, file_size=self._file_size, reader=self.read)
            is_zip = self._file.peek(4).startswith(b"PK\3\4")
            self.root = self._open_zip(machine) if is_zip else self._open_legacy(machine)
        except BaseException:
            self.close()
            raise

    def read(self, tensor):
        """The data of one of its tensors, a new contiguous array."""
        item, axes = tensor.dtype.itemsize, zip(tensor.shape, tensor.strides, strict=True)
        if not tensor.span:
            return np.empty(tensor.shape, tensor.dtype)
        raw = np.empty(tensor.span, f"u{item}")
        read_into(self._file, tensor.storage.offset + tensor.start * item, raw, self._where)
        if self._byteswap:
            raw.byteswap(inplace=True)
        # an axis of one element may have any stride, also one too large for NumPy
        strides = [0 if size == 1 else stride * item for size, stride in axes]
        view = np.ndarray(tensor.shape, tensor.dtype, raw, strides=strides)
        return np.ascontiguousarray(view).reshape(tensor.shape)

    def close(self):
        """Closes the file."""
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _open_zip(self, machine):
        """The pickled object of a zip archive; gives every storage its offset."""
        try:
            with zipfile.ZipFile(self._file) as archive:
                directory = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error) as error:
            raise self._damaged(str(error)[:200]) from error
        entries = {entry.filename: entry for entry in directory}
        if len(entries) != len(directory):
            raise self._damaged("two entries of the archive have the same name")
        pickles = [name for name in entries if re.fullmatch("[^/]+/data.pkl", name)]
        if len(pickles) != 1:
            raise self._damaged(f"an archive with {len(pickles)} data.pkl, a checkpoint has one")
        folder = pickles[0].removesuffix("data.pkl")
        self._check_entries(entries, folder)

        byteorder = entries.get(f"{folder}byteorder")
        if byteorder is not None and self._read_entry(byteorder) not in (b"little", b"big"):
            raise self._damaged("its byteorder is neither little nor big")
        self._byteswap = byteorder is not None and self._read_entry(byteorder) == b"big"
        root = machine.run(io.BytesIO(self._read_entry(entries[pickles[0]])))
        for storage in machine.storages.values():
            entry = entries.get(f"{folder}data/{storage.key}")
            size = entry.file_size if entry else 0
            if size < storage.nbytes:
                raise self._damaged(
                    f"the data of storage {storage.key} has {size} bytes, not {storage.nbytes}"
                )
            storage.offset = self._find_entry(entry) if entry else None
        return root

    def _check_entries(self, entries, folder):
        if f"{folder}constants.pkl" in entries:
            raise self._damaged("a TorchScript program, not a state dict")

    def _read_entry(self, entry):
        """The bytes of a small entry."""
        self._file.seek(self._find_entry(entry))
        if entry.file_size > _MAX_PICKLE_BYTES:
            raise self._damaged(f"{entry.filename} has {entry.file_size} bytes")
        return self._file.read(entry.file_size)

    def _find_entry(self, entry):
        """Position in the file of the bytes of an entry, which torch.save stores as they are."""
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise self._damaged(f"{entry.filename!r} is compressed, torch.save never does that")
        self._file.seek(max(entry.header_offset, 0))
        header = self._file.read(30)
        if entry.header_offset < 0 or len(header) < 30 or not header.startswith(b"PK\3\4"):
            raise self._damaged(f"{entry.filename!r} is not where the archive says")
        position = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
        if position + entry.file_size > self._file_size:
            raise self._damaged(f"{entry.filename!r} does not end within the file")
        return position

    def _open_legacy(self, machine):
        """The pickled object of a file that is no archive; gives every storage its offset.

        Five pickles (magic number, version, platform, object, storage keys), then for each key the
        number of elements (8 bytes) and the elements, little-endian whatever the platform was.
        """
        try:
            start = [machine.run(self._file) for _ in _LEGACY_START]
        except InputError as error:
            raise self._damaged("neither a zip archive nor a pickle of torch.save") from error
        if start != _LEGACY_START:
            raise self._damaged("a pickle, but not one of torch.save")
        machine.run(self._file)
        root = machine.run(self._file)
        keys = machine.run(self._file)
        if type(keys) is not list or not all(type(key) is str for key in keys):
            raise self._damaged("its list of storages is not one")
        if sorted(keys) != sorted(machine.storages):
            raise self._damaged("its list of storages does not fit its tensors")
        end = self._file.tell()
        for key in keys:
            storage = machine.storages[key]
            self._file.seek(end)
            numel = int.from_bytes(self._file.read(8), "little")
            storage.offset = end + 8
            end = storage.offset + storage.nbytes
            if end > self._file_size:
                raise self._damaged(f"the file should have {end} bytes, it has {self._file_size}")
            if numel != storage.numel:
                raise self._damaged(f"storage {key} has {numel} elements, not {storage.numel}")
        return root

    def _damaged(self, what):
        return InputError(
            f"truncated, damaged or unknown file: {what}",
            where=self._where,
            expected="a state dict as torch.save writes it",
            fix=_USE_SAFETENSORS,
        )


def _are_counts(values):
    return all(type(value) is int and 0 <= value < 1 << 63 for value in values)
