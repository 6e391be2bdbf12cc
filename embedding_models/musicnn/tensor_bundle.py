"""Tensors of a TensorFlow checkpoint ("tensor bundle") without TensorFlow, with every checksum on the way verified.

The index is a LevelDB table (https://github.com/google/leveldb/blob/main/doc/table_format.md) whose values are protocol
buffers, a BundleHeaderProto and then a BundleEntryProto a tensor (tensorflow/core/protobuf/tensor_bundle.proto); the
data file is the tensors' bytes. Checksums are CRC-32C, masked as LevelDB does it.
"""

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from common.errors import UserError

_MAGIC = 0xDB4775248B80FB57  # the last eight bytes of a LevelDB table
_FOOTER = 48  # bytes: two block handles, zeros up to 40, the magic
_TRAILER = 5  # bytes after a block: how it is compressed, its checksum
_LARGEST_INDEX = 64 << 20  # bytes; that of a model with ten thousand tensors has one million
_TYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8"}  # DataType -> how numpy calls it
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of protocol buffers

Content = TypeVar("Content")
Fields = dict[int, list[int | bytes]]  # number of a field -> its values


class _Fault(ValueError):
    """What is wrong with a file, in a few words."""


@dataclass(frozen=True)
class _Entry:
    """Where a tensor is in the data file."""

    dtype: int
    shape: tuple[int, ...]
    offset: int
    size: int
    checksum: int


def read_tensor_bundle(folder: Path, wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint in one data file whose name `wanted` says yes to; the others are not read.

    `folder` holds `.index` and `.data-00000-of-00001`, the names of a checkpoint that was saved as "folder/". Shapes
    are as stored (convolutions: time, frequency, in, out). Raises `UserError`, naming the file, for what is missing,
    damaged or no such checkpoint.
    """
    index, data = folder / ".index", folder / ".data-00000-of-00001"
    entries = _told(index, lambda: _read_entries(_read(index, 0, _LARGEST_INDEX)))
    end = max((entry.offset + entry.size for entry in entries.values()), default=0)
    return _told(data, lambda: dict(_read_tensors(data, entries, end, wanted)))


def _told(path: Path, read: Callable[[], Content]) -> Content:
    """What `read` returns; its failures as a line about the file."""
    try:
        return read()
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found; expected a file of a TensorFlow checkpoint there") from error
    except OSError as error:
        raise UserError(f"{path}: expected a file of a TensorFlow checkpoint, found {error.strerror}") from error
    except _Fault as error:
        raise UserError(f"{path}: expected an undamaged TensorFlow checkpoint, found {error}") from error


def _read(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def _read_tensors(
    path: Path, entries: dict[str, _Entry], end: int, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, torch.Tensor]]:
    if (length := path.stat().st_size) != end:
        raise _Fault(f"{length:,} bytes where the index asks for {end:,}")
    for name, entry in entries.items():
        if not wanted(name):
            continue
        if entry.dtype not in _TYPES:
            raise _Fault(f"data type {entry.dtype} in {name}, which is not read here")
        dtype = np.dtype(_TYPES[entry.dtype])
        if math.prod(entry.shape) * dtype.itemsize != entry.size:
            raise _Fault(f"{entry.size:,} bytes for the shape {entry.shape} of {name}")
        content = _read(path, entry.offset, entry.size)
        if _masked(crc32c(content)) != entry.checksum:
            raise _Fault(f"{name} with a checksum that does not fit")
        yield name, torch.from_numpy(np.frombuffer(content, dtype).reshape(entry.shape).copy())


def _read_entries(table: bytes) -> dict[str, _Entry]:
    """The index's entries by tensor name."""
    items = list(_table_items(table))
    if not items or items[0][0] != b"":
        raise _Fault("no header of a checkpoint")
    header = _fields(items[0][1])
    if (shards := _number(header, 1)) != 1 or _number(header, 2) != 0:
        raise _Fault(f"{shards} data files or big-endian numbers, of which only one little-endian file is read here")
    try:
        return {key.decode(): _entry(_fields(value)) for key, value in items[1:]}
    except UnicodeDecodeError as error:
        raise _Fault("names that are not text") from error


def _entry(fields: Fields) -> _Entry:
    if 7 in fields or _number(fields, 3) != 0:
        raise _Fault("tensors in slices or in other data files, which are not read here")
    shape = []
    for message in fields.get(2, []):
        for dimension in _fields(_as_bytes(message)).get(2, []):
            shape.append(_number(_fields(_as_bytes(dimension)), 1))
    return _Entry(*(_number(fields, 1), tuple(shape)), *(_number(fields, number) for number in (4, 5, 6)))


def _table_items(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a LevelDB table, in order."""
    footer = table[-_FOOTER:]
    if len(footer) < _FOOTER or struct.unpack("<Q", footer[-8:])[0] != _MAGIC:
        raise _Fault("no LevelDB table (it ends otherwise)")
    handles, position = [], 0
    for _ in range(4):
        number, position = _varint(footer[:40], position)
        handles.append(number)
    if any(footer[position:40]) or sum(handles[2:]) + _TRAILER + _FOOTER != len(
        table
    ):  # the last block, then the footer
        raise _Fault("a damaged end of the table")
    list(_block_items(_block(table, *handles[:2])))  # of no use, but its damage is the file's
    last = None
    for _, handle in _block_items(_block(table, *handles[2:])):
        offset, position = _varint(handle, 0)
        size, _ = _varint(handle, position)
        for key, value in _block_items(_block(table, offset, size)):
            if last is not None and key <= last:
                raise _Fault("names out of order")
            last = key
            yield key, value


def _block(table: bytes, offset: int, size: int) -> bytes:
    """The content of one block, checked."""
    end = offset + size
    if end + _TRAILER > len(table) - _FOOTER:
        raise _Fault(f"a block up to byte {end + _TRAILER:,} of {len(table) - _FOOTER:,}")
    compression, checksum = struct.unpack("<BI", table[end : end + _TRAILER])
    if _masked(crc32c(table[offset : end + 1])) != checksum:
        raise _Fault("a block with a checksum that does not fit")
    if compression != 0:
        raise _Fault(f"a block with compression {compression}, which is not read here")
    return table[offset:end]


def _block_items(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a block; a key is stored as what it does not share with the one before it."""
    if len(block) < 4:
        raise _Fault("a block without an end")
    end = len(block) - 4 - 4 * struct.unpack("<I", block[-4:])[0]  # restart points, of no use to who reads it all
    if end < 0:
        raise _Fault("a block with more restart points than bytes")
    position, key = 0, b""
    while position < end:
        lengths = []
        for _ in range(3):
            number, position = _varint(block, position)
            lengths.append(number)
        shared, own, size = lengths
        if shared > len(key) or position + own + size > end:
            raise _Fault("a name or value that is longer than its block")
        key = key[:shared] + block[position : position + own]
        position += own + size
        yield key, block[position - size : position]


def _varint(content: bytes, position: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and the position after it."""
    number = 0
    for shift in range(0, 70, 7):
        if position >= len(content):
            break
        byte, position = content[position], position + 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
    raise _Fault("a number that does not end")


def _fields(message: bytes) -> Fields:
    """The fields of a protocol buffer."""
    fields: Fields = {}
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        wire = tag & 7
        value: int | bytes
        if wire == _VARINT:
            value, position = _varint(message, position)
        elif wire in (_FIXED32, _FIXED64, _BYTES):
            size = {_FIXED32: 4, _FIXED64: 8}.get(wire)
            if size is None:
                size, position = _varint(message, position)
            value = message[position : position + size]
            position += size
            if len(value) != size:
                raise _Fault("an entry that is cut short")
            value = value if wire == _BYTES else int.from_bytes(value, "little")
        else:
            raise _Fault(f"an entry with the unknown wire type {wire}")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _number(fields: Fields, number: int) -> int:
    """A field's last value, 0 where it is left out, as protocol buffers have it."""
    value = fields.get(number, [0])[-1]
    if not isinstance(value, int):
        raise _Fault(f"text in field {number} of an entry, where a number is expected")
    return value


def _as_bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise _Fault("a number in a shape, where a message is expected")
    return value


def _masked(checksum: int) -> int:
    """LevelDB stores checksums turned by 15 bits and moved, so that one over stored checksums stays a good one."""
    turned = (checksum >> 15 | checksum << 17) & 0xFFFFFFFF
    return (turned + 0xA282EAD8) & 0xFFFFFFFF


# CRC-32C (Castagnoli, reflected). Without its initial value the remainder is linear over GF(2): leading zeros do not
# change it, and that of "A then B" is that of A moved by the length of B, xor that of B. So the bytes are cut into
# lanes of equal length that go through the tables side by side, four bytes a step, and are joined in pairs.
_POLYNOMIAL = 0x82F63B78
_START = bytes.fromhex("54641f64")  # after these the remainder is 0xFFFFFFFF, the initial value of CRC-32C
_LONGEST_LANE = 8  # 2 ** 8 words; many short lanes cost less than few long ones


def crc32c(content: bytes) -> int:
    """CRC-32C of bytes, as RFC 3720 (iSCSI) has it; 3 MB take some 40 ms."""
    content = _START + content
    words = -(-len(content) // 4)
    log_steps = min(_LONGEST_LANE, words.bit_length() // 2)
    lanes = -(-words >> log_steps)
    padded = bytes((lanes << log_steps + 2) - len(content)) + content
    columns = np.ascontiguousarray(np.frombuffer(padded, "<u4").reshape(lanes, 1 << log_steps).T)
    remainders = np.zeros(lanes, np.uint32)
    low, high = _tables()
    for column in columns:
        remainders ^= column
        remainders = low.take(remainders & 0xFFFF) ^ high.take(remainders >> 16)
    log_bytes = log_steps + 2
    while len(remainders) > 1:
        if len(remainders) % 2:
            remainders = np.concatenate([np.zeros(1, np.uint32), remainders])
        remainders = _mapped(_zeros(log_bytes), remainders[::2]) ^ remainders[1::2]
        log_bytes += 1
    return int(remainders[0]) ^ 0xFFFFFFFF


@cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """What the lower and the upper half of a word become when four bytes of zero follow, (65,536,) each."""
    halves = np.arange(1 << 16, dtype=np.uint32)
    return _mapped(_zeros(2), halves), _mapped(_zeros(2), halves << np.uint32(16))


@cache
def _zeros(log_bytes: int) -> np.ndarray:
    """The images of the 32 bits of a remainder when 2 ** `log_bytes` bytes of zero follow."""
    if log_bytes > 0:
        half = _zeros(log_bytes - 1)
        return _mapped(half, half)
    images: np.ndarray = np.uint32(1) << np.arange(32, dtype=np.uint32)
    for _ in range(8):
        images = images >> 1 ^ (images & 1) * np.uint32(_POLYNOMIAL)
    return images


def _mapped(images: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Apply a linear map over GF(2), given by the images of the bits, to values."""
    result = np.zeros_like(values)
    for bit, image in enumerate(images):
        result ^= (values >> np.uint32(bit) & np.uint32(1)) * image
    return result
