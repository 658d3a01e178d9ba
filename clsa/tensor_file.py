"""A safetensors file: its header, checked before a single number is read, and its tensors, mapped into memory.

A file is 8 bytes (length of the header, little endian), the header (a JSON object: name -> dtype, shape and
[begin, end) within the data), and the data, without gaps and to the last byte.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from clsa.config import show
from clsa.errors import CheckpointError
from clsa.files import parse_json
from clsa.float8 import FLOAT8

MAX_HEADER_BYTES = 1 << 24  # ten times what the largest config needs
NUMPY_DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
FLOAT_DTYPES = NUMPY_DTYPES | {"F8_E4M3": FLOAT8}  # and what a prefix may be kept in
PACKED = "U32"  # words of packed 4- or 8-bit integers
_STORED_DTYPES = FLOAT_DTYPES | {PACKED: np.dtype("<u4")}
# Bits that are all set in what is no number: the exponent, and in E4M3, whose only such code is NaN, the mantissa too.
_NOT_FINITE = {
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F32": (np.uint32, 0x7F800000),
    "F8_E4M3": (np.uint8, 0x7F),
}
_CHUNK = 1 << 20  # numbers checked at a time
_MAX_DIM = 1 << 40


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: bytes [offset, offset + nbytes) of `file`, row-major, little endian."""

    name: str
    file: Path
    dtype: str  # "BF16", "F16", "F32", "F8_E4M3" or "U32"
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * int(_STORED_DTYPES[self.dtype].itemsize)


def read_entries(file: Path, where: Path, dtypes: Sequence[str] = (*NUMPY_DTYPES, PACKED)) -> list[TensorEntry]:
    """The tensors of a safetensors file in the order of their data, which are of these dtypes.

    `where` is the name for error sentences. Raises CheckpointError unless every byte of the file is accounted for.
    """
    header, start, size = _read_header(file, where)
    header.pop("__metadata__", None)
    entries = [_entry(name, value, file, where, start, dtypes) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    position = start
    for entry in entries:
        if entry.offset != position:
            raise CheckpointError(
                f"{where}: the data of {show(entry.name)} begins at byte {entry.offset}, "
                f"expected {position}; the file is damaged, write it again"
            )
        position += entry.nbytes
    if position != size:
        what = "truncated" if size < position else "too long"
        raise CheckpointError(f"{where} is {what}: {size} bytes where its header needs {position}; fetch it again")
    return entries


def read_metadata(file: Path, where: Path) -> dict[str, str]:
    """The texts under `__metadata__` of a safetensors file, empty if it has none. See `read_entries` for errors."""
    metadata = _read_header(file, where)[0].get("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{where} has __metadata__ {show(metadata)}, must be an object of texts")
    return metadata


def _read_header(file: Path, where: Path) -> tuple[dict[str, Any], int, int]:
    """The header, the byte at which the data begins, and the size of the file."""
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(f"{where} is truncated or no safetensors file; fetch or convert it again")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{where} has a header of {length} bytes, at most {MAX_HEADER_BYTES} are read")
            data = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {error.strerror}") from None
    return parse_json(data, f"the header of {where}"), 8 + length, size


def _entry(name: str, value: Any, file: Path, where: Path, start: int, dtypes: Sequence[str]) -> TensorEntry:
    label = f"{where}: tensor {show(name)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{label} must have dtype, shape and data_offsets, got {show(value)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise CheckpointError(f"{label} has dtype {show(dtype)}, must be one of {', '.join(dtypes)}")
    if not _are_sizes(shape, 8):
        raise CheckpointError(f"{label} has shape {show(shape)}, must be a list of sizes")
    if not _are_sizes(offsets, 2) or len(offsets) != 2:
        raise CheckpointError(f"{label} has data_offsets {show(offsets)}, must be two byte positions")
    entry = TensorEntry(name, file, dtype, tuple(shape), start + offsets[0])
    if offsets[1] - offsets[0] != entry.nbytes:
        raise CheckpointError(
            f"{label} has {offsets[1] - offsets[0]} bytes of data where its shape {show(shape)} needs {entry.nbytes}"
        )
    return entry


def _are_sizes(value: object, at_most: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= at_most
        and all(type(item) is int and 0 <= item <= _MAX_DIM for item in value)
    )


def map_tensors(entries: Sequence[TensorEntry]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of one file as read-only views of the mapped file; `entries` are all that it has."""
    file, size = entries[0].file, max(entry.offset + entry.nbytes for entry in entries)
    try:
        with file.open("rb") as stream:
            if stream.seek(0, 2) != size:  # reading past the end of a mapped file would kill the process
                raise CheckpointError(f"{file} changed while it was read; load it again")
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    for entry in entries:
        array = np.frombuffer(data, _STORED_DTYPES[entry.dtype], math.prod(entry.shape), entry.offset)
        yield entry.name, (array if array.flags.aligned else array.copy()).reshape(entry.shape)


def is_finite(array: np.ndarray) -> bool:
    """Whether a contiguous array of one of FLOAT_DTYPES holds no NaN and no infinity."""
    kind = next(name for name, dtype in FLOAT_DTYPES.items() if dtype == array.dtype)
    bits_type, special = _NOT_FINITE[kind]
    bits, mask = array.reshape(-1).view(bits_type), bits_type(special)
    return all(bool(((bits[i : i + _CHUNK] & mask) != mask).all()) for i in range(0, bits.size, _CHUNK))
