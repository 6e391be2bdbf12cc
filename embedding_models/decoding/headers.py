"""WAV, AIFF and FLAC headers that say how much sound follows: set right where they cannot be true.

WAV and AIFF are a row of chunks: a four-letter name, a size of four bytes (little-endian in WAV, big-endian in AIFF)
and that many bytes, padded to be even. RF64 (EBU Tech 3306) keeps the size of its sound, in eight bytes, in a chunk
"ds64". FLAC (RFC 9639) counts its samples in the 36 bits before the last 16 bytes of STREAMINFO.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from embedding_models.decoding.views import ByteReader, Piece, patched

_STRAY_BYTES = 4096  # what may follow the sound without being any
_TAGS = (b"ID3", b"TAG", b"APETAGEX")  # of other formats, put behind the last chunk by careless taggers
_SOUND = {b"RIFF": b"data", b"RF64": b"data", b"RIFX": b"data", b"FORM": b"SSND"}


Order = Literal["little", "big"]


class Header(NamedTuple):
    """What a header comes to: the file as it should be read, None for as it is; how much was promised for each byte
    (or frame) that is there, 1 where all is there or nothing can be said; FLAC's count of frames, None if unknown."""

    pieces: list[Piece] | None = None
    promised: float = 1.0
    frames: int | None = None


class _Field(NamedTuple):
    """A number in a file: where it is, in how many bytes, and its value."""

    position: int
    width: int
    value: int


def id3_end(reader: ByteReader, position: int = 0) -> int:
    """Where the ID3v2 tags at a position end; the position itself where there are none."""
    while (head := reader.at(position, 10))[:3] == b"ID3" and len(head) == 10 and max(head[6:10]) < 128:
        size = sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
        position += 10 + size + 10 * bool(head[5] & 0x10)  # a footer repeats the header
    return position


def read_header(reader: ByteReader) -> Header:
    """Look at a file's header; one that is none of these formats, or sound, is left as it is."""
    magic = reader.at(0, 4)
    if magic in _SOUND:
        return _chunked(reader, magic)
    start = id3_end(reader)
    return _flac(reader, start) if reader.at(start, 4) == b"fLaC" else Header()


def _chunked(reader: ByteReader, magic: bytes) -> Header:
    order: Order = "big" if magic in (b"FORM", b"RIFX") else "little"
    long_size = None
    for position, name, size in _chunks(reader, 12, order):
        if name == b"ds64":
            long_size = _Field(position + 16, 8, int.from_bytes(reader.at(position + 16, 8), "little"))
        if name == _SOUND[magic]:
            field = _Field(position + 4, 4, size)
            if magic == b"RF64" and size == 0xFFFFFFFF and long_size is not None:
                field = long_size
            return _settled(reader, position + 8, field, order)
    return Header()


def _chunks(reader: ByteReader, position: int, order: Order) -> Iterator[tuple[int, bytes, int]]:
    """Position, name and size of the chunks from a position on."""
    while len(head := reader.at(position, 8)) == 8:
        size = int.from_bytes(head[4:], order)
        yield position, head[:4], size
        position += 8 + size + size % 2


def _settled(reader: ByteReader, start: int, field: _Field, order: Order) -> Header:
    """What to make of a sound chunk whose content starts at `start` and whose size is `field`."""
    there = reader.size - start
    if not _placeholder(field, there):
        if field.value > there:
            return Header(promised=field.value / there if there > 0 else 1.0)
        if _tail_is_no_sound(reader, start + field.value, order):
            return Header()
    largest = (1 << 8 * field.width) - 1
    return Header(patched(reader.size, {field.position: min(there, largest).to_bytes(field.width, order)}))


def _placeholder(field: _Field, there: int) -> bool:
    """Whether a size that is too large is what a program writes that cannot know it: near 2 or 4 GiB, or all ones."""
    near_limit = field.width == 4 and (0x7FFF0000 <= field.value <= 0x80010000 or field.value >= 0xFFFF0000)
    return field.value > there and (near_limit or field.value >= 1 << 62)


def _tail_is_no_sound(reader: ByteReader, end: int, order: Order) -> bool:
    """Whether what follows the sound's stated end is nothing much, more chunks, tags or padding."""
    if reader.size - end <= _STRAY_BYTES:
        return end > 0 and not _whole_file_is_tail(reader, end)
    for position in (end, end + end % 2):
        head = reader.at(position, 8)
        if head.startswith(_TAGS):
            return True
        size = int.from_bytes(head[4:], order)
        if all(32 <= byte < 127 for byte in head[:4]) and size <= reader.size - position:
            return True
    rest = reader.size - end
    return rest <= 16 * _STRAY_BYTES and not any(reader.at(end, rest))


def _whole_file_is_tail(reader: ByteReader, end: int) -> bool:
    """Whether a little sound is all there is: a size of nothing in a file of a few thousand bytes."""
    return reader.size - end > 64 and end < 128


def _flac(reader: ByteReader, start: int) -> Header:
    info = reader.at(start, 26)
    if len(info) < 26 or info[4] & 0x7F != 0:  # STREAMINFO is to be first
        return Header()
    frames = int.from_bytes(info[21:26]) & 0xFFFFFFFFF
    if frames == 0:
        return Header(None, 1.0, 0)
    # libsndfile stops at the count; without one it reads to the end.
    return Header(patched(reader.size, {start + 21: bytes([info[21] & 0xF0, 0, 0, 0, 0])}), 1.0, frames)
