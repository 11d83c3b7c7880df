"""Safetensors files, read and written one tensor at a time.

The format: the header's length (8 bytes, little-endian), the header (a JSON object
`{name: {"dtype", "shape", "data_offsets"}}`, padded with spaces), then the tensors, little-endian
in C order without gaps. Reads are plain ones: the pages of a memory map would count as memory of
this process, and a component can be larger than that.

Source: https://github.com/huggingface/safetensors, "Format".
"""

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from animecolor_jax.errors import InputError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the limit of the public readers
_CUT_BYTES = 4 << 20  # rows of a slice that are shorter are read whole and cut
_COPY_AGAIN = "download or copy the file again"


class Spec(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self):
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(path, specs, leaves, metadata=None):
    """Writes a safetensors file, holding one leaf at a time.

    The file appears under its name when it is complete; whatever goes wrong before leaves nothing.

    Args:
        path: the file to write; one that is there is replaced.
        specs: {name: anything with `shape` and `dtype`}, such as `Spec` or `jax.ShapeDtypeStruct`.
        leaves: iterable of (name, array), every name of `specs` exactly once, in any order.
        metadata: {str: str} for the header, or None.
    Raises:
        ValueError: the leaves do not fit `specs`, or the format has no place for a dtype or for
            the metadata.
    """
    path = Path(path)
    specs = {key: Spec(tuple(spec.shape), np.dtype(spec.dtype)) for key, spec in specs.items()}
    header, offsets = _build_header(specs, metadata)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(header)
            missing = dict(specs)
            for name, leaf in leaves:
                if name not in missing:
                    problem = "given twice" if name in specs else "not announced"
                    raise ValueError(f"leaf {name!r} was {problem}")
                spec = missing.pop(name)
                leaf = np.asarray(leaf)
                if (leaf.shape, leaf.dtype) != spec:
                    raise ValueError(
                        f"leaf {name!r} is {leaf.dtype}{list(leaf.shape)}, "
                        f"announced as {spec.dtype}{list(spec.shape)}"
                    )
                file.seek(len(header) + offsets[name])
                file.write(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
            if missing:
                raise ValueError(f"leaves announced but not given: {sorted(missing)}")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _build_header(specs, metadata):
    """Header bytes, and each tensor's offset behind them."""
    entries, offsets, end = {}, {}, 0
    if metadata:
        if not all(isinstance(item, str) for pair in metadata.items() for item in pair):
            raise ValueError(f"safetensors metadata holds strings only, got {metadata!r}")
        entries["__metadata__"] = dict(metadata)
    if "__metadata__" in specs:
        raise ValueError("'__metadata__' cannot name a tensor")
    # widest dtype first, so that every tensor is aligned to its own elements
    for name, spec in sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize):
        if spec.dtype not in DTYPE_NAMES:
            known = ", ".join(map(str, DTYPE_NAMES))
            raise ValueError(f"leaf {name!r} has dtype {spec.dtype}, expected one of {known}")
        offsets[name], end = end, end + spec.nbytes
        entries[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


class Reader:
    """An open safetensors file; a context manager.

    Attributes:
        specs: {name: Spec}.
        metadata: {str: str}, the header's `__metadata__`.
    Raises:
        InputError: the file is missing, truncated or damaged, or has a dtype not in `DTYPES`.
    """

    def __init__(self, path):
        self._where = str(path)
        self._file = open_weights(path)
        try:
            self.specs, self.metadata, self._offsets = self._read_header()
        except BaseException:
            self.close()
            raise

    def read(self, name):
        """The whole tensor, a new array."""
        return self.read_slice(name, ())

    def read_slice(self, name, index):
        """`tensor[index]`, a new array, reading little more of the file than that.

        Args:
            name: one of `specs`.
            index: up to one slice per axis, all of step 1, as a sharding hands them out.
        """
        shape, dtype = self.specs[name]
        bounds = [part.indices(size) for part, size in zip(index, shape, strict=False)]
        if len(index) > len(shape) or any(step != 1 for _, _, step in bounds):
            raise ValueError(f"expected a slice of step 1 per axis of {list(shape)}, got {index}")
        ranges = [(start, max(start, stop)) for start, stop, _ in bounds]
        ranges += [(0, size) for size in shape[len(index) :]]
        out = np.empty([stop - start for start, stop in ranges], dtype)
        if out.size:
            self._fill(out, self._offsets[name], shape, ranges)
        return out

    def close(self):
        """Closes the file."""
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _fill(self, out, offset, shape, ranges):
        """Reads `ranges` of the tensor of `shape` at byte `offset` into the contiguous `out`."""
        (start, stop), row = ranges[0] if ranges else (0, 1), out.itemsize * math.prod(shape[1:])
        if ranges[1:] == [(0, size) for size in shape[1:]]:
            read_into(self._file, offset + start * row, out, self._where)
            return
        if row > _CUT_BYTES:
            for index in range(start, stop):
                self._fill(out[index - start], offset + index * row, shape[1:], ranges[1:])
            return
        columns = tuple(slice(*bounds) for bounds in ranges[1:])
        step = _CUT_BYTES // row
        for first in range(start, stop, step):
            block = np.empty((min(step, stop - first), *shape[1:]), out.dtype)
            read_into(self._file, offset + first * row, block, self._where)
            out[first - start : first - start + len(block)] = block[(slice(None), *columns)]

    def _read_header(self):
        """(specs, metadata, absolute offsets), every number checked against the file's size."""
        file_size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if file_size < 8 or length > min(file_size - 8, MAX_HEADER_BYTES):
            raise InputError(
                f"no safetensors file, or truncated: {file_size} bytes, a header of {length} bytes",
                where=self._where,
                expected="a safetensors file",
                fix=_COPY_AGAIN,
            )
        header = parse_json_object(self._file.read(length), self._where)
        metadata = header.pop("__metadata__", {})
        if type(metadata) is not dict or any(type(item) is not str for item in metadata.values()):
            raise self._damaged("__metadata__ is not an object of strings")
        entries = {name: self._parse_entry(name, entry) for name, entry in header.items()}
        places = sorted((begin, spec.nbytes, name) for name, (spec, begin) in entries.items())
        end = 0
        for begin, nbytes, name in places:
            if begin != end:
                raise self._damaged(f"{name!r} begins at {begin}, the tensor before ends at {end}")
            end += nbytes
        if 8 + length + end != file_size:
            raise InputError(
                f"truncated or damaged: the file has {file_size} bytes",
                where=self._where,
                expected=f"{8 + length + end} bytes",
                fix=_COPY_AGAIN,
            )
        specs = {name: spec for name, (spec, _) in entries.items()}
        return specs, metadata, {name: 8 + length + begin for name, (_, begin) in entries.items()}

    def _parse_entry(self, name, entry):
        """One tensor of the header as (Spec, offset)."""
        match entry:
            case {
                "dtype": str(dtype),
                "shape": list(shape),
                "data_offsets": [int(begin), int(end)],
            }:
                pass
            case _:
                raise self._damaged(f"the entry of {name!r} is not dtype, shape and data_offsets")
        if dtype not in DTYPES:
            raise InputError(
                f"tensor {name!r} has dtype {dtype!r}",
                where=self._where,
                expected=f"one of {list(DTYPES)}",
                fix="save the file again with another dtype",
            )
        if not is_shape(shape):
            raise self._damaged(f"tensor {name!r} has an impossible shape")
        spec = Spec(tuple(shape), DTYPES[dtype])
        if end - begin != spec.nbytes:
            raise self._damaged(f"{name!r} of {dtype}{shape} has bytes {begin} to {end}")
        return spec, begin

    def _damaged(self, what):
        return InputError(f"damaged header: {what}", where=self._where, fix=_COPY_AGAIN)


def open_weights(path):
    """Opens a file of weights for reading.

    Raises:
        InputError: it cannot be opened, is empty, or is a Git LFS pointer in place of the file.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 (the caller closes it)
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror}", where=path, expected="a file of weights"
        ) from error
    start = file.peek(32)
    if start and not start.startswith(b"version https://git-lfs"):
        return file
    file.close()
    if start:
        raise InputError("a Git LFS pointer, not the file", where=path, fix="run `git lfs pull`")
    raise InputError("an empty file", where=path, expected="a file of weights", fix=_COPY_AGAIN)


def is_shape(sizes):
    """Whether the sizes from a file are those of an array that NumPy can hold."""
    if len(sizes) > 32 or not all(type(size) is int and size >= 0 for size in sizes):
        return False
    return math.prod(max(size, 1) for size in sizes) < 1 << 56


def read_into(file, offset, out, where):
    """Fills the contiguous array `out` with the file's bytes from `offset` on.

    Raises:
        InputError: the file ends before.
    """
    file.seek(offset)
    got = file.readinto(out.reshape(-1).view(np.uint8))
    if got != out.nbytes:
        raise InputError(
            f"truncated: {got} of {out.nbytes} bytes from byte {offset} on",
            where=where,
            fix=_COPY_AGAIN,
        )


def parse_json_object(data, where):
    """Strict JSON bytes that hold one object, as a dict.

    Raises:
        InputError: not UTF-8, not JSON (NaN and Infinity are not), not an object, or a name occurs
            twice in one.
    """

    def unique(pairs):
        values = {}
        for name, value in pairs:
            if name in values:
                raise ValueError(f"{name!r} occurs twice")
            values[name] = value
        return values

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    try:
        values = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=refuse)
        if not isinstance(values, dict):
            raise ValueError(f"a {type(values).__name__}")
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"damaged: {error}", where=where, expected="one JSON object", fix=_COPY_AGAIN
        ) from error
    return values
