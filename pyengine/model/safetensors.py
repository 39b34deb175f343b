"""Our own reader of safetensors files: the header is checked in full, the data is memory-mapped.

    8 bytes   n, little-endian
    n bytes   JSON object: tensor name -> {"dtype", "shape", "data_offsets": [begin, end)}, and
              optionally "__metadata__": {string: string}; padded with spaces
    the rest  data; the tensors cover it without holes or overlaps

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from pyengine import _C
from pyengine.errors import CheckpointError
from pyengine.model.files import MAX_BYTES, open_file, unreadable
from pyengine.model.json_file import parse_json_object, show

# Name in the header -> our name, bits of one element.
_DTYPES = {
    "F64": ("float64", 64),
    "F32": ("float32", 32),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3": ("float8_e4m3", 8),
    "F8_E8M0": ("float8_e8m0", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F6_E2M3": ("float6_e2m3", 6),
    "F6_E3M2": ("float6_e3m2", 6),
    "F4": ("float4", 4),
    "C64": ("complex64", 64),
    "I64": ("int64", 64),
    "I32": ("int32", 32),
    "I16": ("int16", 16),
    "I8": ("int8", 8),
    "U64": ("uint64", 64),
    "U32": ("uint32", 32),
    "U16": ("uint16", 16),
    "U8": ("uint8", 8),
    "BOOL": ("bool", 8),
}

_DATA_ALIGNMENT = 64  # of what write_safetensors writes


class Tensor(NamedTuple):
    """One tensor of a checkpoint file, read in place."""

    name: str  # as the file has it
    dtype: str  # "float32", "bfloat16", "float16", "int64", ...
    shape: tuple[int, ...]
    data: memoryview  # bytes, little-endian, C order; keeps the mapping of the file alive
    file: str

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


class SafetensorsFile(NamedTuple):
    """A parsed file: its tensors in the order of the header, and its ``__metadata__``."""

    path: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_safetensors(path: str | os.PathLike[str]) -> SafetensorsFile:
    """Map a file and check its header. Data is not read. CheckpointError names the file and the fault."""
    path = os.fspath(path)
    with open_file(path, CheckpointError) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            header = _read_header(file, size, path)
            mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except (OSError, ValueError, OverflowError) as e:
            raise unreadable(path, e, CheckpointError) from None
        data = memoryview(_C.FileView(mapping, file.fileno(), path))
    data_start = 8 + len(header)
    entries, metadata = parse_header(header, size - data_start, path)
    tensors = {
        name: Tensor(name, dtype, shape, data[data_start + begin : data_start + end], path)
        for name, dtype, shape, begin, end in entries
    }
    return SafetensorsFile(path, tensors, metadata)


def _read_header(file: BinaryIO, size: int, path: str) -> bytes:
    """The JSON of the header. Read, not mapped: its length may be a lie, the file may be cut meanwhile."""
    start = file.read(8)
    if len(start) < 8:
        raise CheckpointError(
            f"{path} is {size} bytes long, too short for a safetensors file; it may be an incomplete download"
        )
    header_bytes = int.from_bytes(start, "little")
    if header_bytes > MAX_BYTES or header_bytes > size - 8:
        hint = (
            "it is a Git LFS pointer; run 'git lfs pull'"
            if start == b"version "
            else "the file is damaged, incomplete or not a safetensors file"
        )
        raise CheckpointError(
            f"{path}: the header claims {header_bytes} bytes, but the file has {size} "
            f"(and {MAX_BYTES} are allowed); {hint}"
        )
    header = file.read(header_bytes)
    if len(header) < header_bytes:
        raise CheckpointError(f"{path} was truncated while it was read; load it again once it is complete")
    return header


class _Entry(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def parse_header(header: bytes, data_bytes: int, path: str) -> tuple[list[_Entry], dict[str, str]]:
    """Entries and metadata of a header (the JSON, without its length) for ``data_bytes`` bytes of data."""
    if not header.startswith(b"{"):
        raise CheckpointError(f"{path}: the header must start with '{{', not {show(header[:8])}")
    fields = parse_json_object(header, f"{path}: the header", CheckpointError, unique_keys=True)
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: __metadata__ is {show(metadata)}; it must be an object of strings")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise CheckpointError(f"{path}: __metadata__ field {show(key)} is {show(value)}, not a string")
    entries = [_parse_entry(name, entry, data_bytes, path) for name, entry in fields.items()]
    _check_coverage(entries, data_bytes, path)
    return entries, metadata


def _parse_entry(name: str, entry: Any, data_bytes: int, path: str) -> _Entry:
    where = f"{path}: tensor {show(name)}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} is {show(entry)}; it must be an object")
    for field in ("dtype", "shape", "data_offsets"):
        if field not in entry:
            raise CheckpointError(f"{where} has no field {field!r}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(f"{where}: dtype is {show(dtype)}; known are {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise CheckpointError(f"{where}: shape is {show(shape)}; it must be a list of integers >= 0")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise CheckpointError(f"{where}: data_offsets is {show(offsets)}; it must be two integers >= 0")
    begin, end = offsets
    if begin > end or end > data_bytes:
        raise CheckpointError(
            f"{where}: data_offsets is {show(offsets)}, outside the {data_bytes} bytes of data; "
            "the file is damaged or incomplete"
        )
    our_name, bits = _DTYPES[dtype]
    expected_bits = _element_bits(shape, bits, limit=8 * data_bytes)
    if expected_bits != 8 * (end - begin):
        raise CheckpointError(
            f"{where}: shape {show(shape)} of {dtype} does not fill data_offsets {show(offsets)}, "
            f"{end - begin} bytes"
        )
    return _Entry(name, our_name, tuple(shape), begin, end)


def _is_size(value: object) -> bool:
    return type(value) is int and value >= 0  # type(): a bool is an int to isinstance


def _element_bits(shape: list[int], bits: int, limit: int) -> int:
    """Bits of a tensor; stops at the first product above ``limit``, so that no number grows without end."""
    if 0 in shape:
        return 0
    for size in shape:
        bits *= size
        if bits > limit:
            break
    return bits


def _check_coverage(entries: list[_Entry], data_bytes: int, path: str) -> None:
    """The tensors, sorted by offset, must follow each other from the first byte of data to the last."""
    position, previous = 0, "the start of the data"
    for entry in sorted(entries, key=lambda e: (e.begin, e.end)):
        if entry.begin != position:
            fault = "overlaps" if entry.begin < position else "leaves a hole after"
            raise CheckpointError(
                f"{path}: tensor {show(entry.name)} starts at data offset {entry.begin} and {fault} "
                f"{previous}, which ends at {position}; data_offsets must cover the data exactly"
            )
        position, previous = entry.end, f"tensor {show(entry.name)}"
    if position != data_bytes:
        raise CheckpointError(
            f"{path}: the data has {data_bytes} bytes, but data_offsets of the tensors end at {position}"
        )


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, tuple[Any, str, Sequence[int]]],
    metadata: dict[str, str],
) -> int:
    """Write (buffer, dtype, shape) by name; returns the bytes of data. Raises OSError.

    Bytes come first, and the data starts at a multiple of 64: packed weights lie on cache lines when mapped.
    """
    names = {name: code for code, (name, _) in _DTYPES.items()}
    ordered = sorted(tensors.items(), key=lambda item: (item[1][1] != "uint8", -len(item[1][2])))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (buffer, dtype, shape) in ordered:
        begin, end = end, end + memoryview(buffer).nbytes
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _DATA_ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, (buffer, _, _) in ordered:
            file.write(buffer)
        file.flush()
        os.fsync(file.fileno())
    return end
