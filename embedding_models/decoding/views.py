"""Views of a file: its bytes at any place, read in chunks, and a file put together from parts of another."""

import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import BinaryIO

_CHUNK = 1 << 16

Piece = bytes | tuple[int, int]
"""A part of a spliced file: bytes of its own, or (start, stop) in the file below."""


class ByteReader:
    """The bytes of a file at any position; a chunk is kept, so that small steps forward cost little."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.size = file.seek(0, os.SEEK_END)
        self._start, self._chunk = 0, b""

    def at(self, position: int, count: int) -> bytes:
        """Up to `count` bytes from `position`; fewer where the file ends."""
        if not self._start <= position <= position + count <= self._start + len(self._chunk):
            self._file.seek(position)
            self._start, self._chunk = position, self._file.read(max(count, _CHUNK))
        offset = position - self._start
        return self._chunk[offset : offset + count]

    def find(self, wanted: bytes, start: int, stop: int) -> int:
        """The first position in [start, stop) at which `wanted` begins; -1 where there is none."""
        while start < min(stop, self.size):
            chunk = self.at(start, min(_CHUNK, stop - start) + len(wanted) - 1)
            if (found := chunk.find(wanted)) >= 0:
                return start + found
            start += _CHUNK
        return -1


class Spliced:
    """A file made of pieces of another one and of bytes of its own, in order, as far as soundfile needs one."""

    def __init__(self, file: BinaryIO, pieces: Sequence[Piece]):
        self._file = file
        self._pieces = pieces
        lengths = [len(piece) if isinstance(piece, bytes) else piece[1] - piece[0] for piece in pieces]
        self._ends = list(accumulate(lengths))
        self._position = 0

    def tell(self) -> int:
        """The position in the whole."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position; stay, as the system's lseek does, where it would be before the beginning."""
        size = self._ends[-1] if self._ends else 0
        wanted = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: size}[whence]
        self._position = wanted if wanted >= 0 else self._position
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        """Fill a buffer as far as the file goes; returns the bytes read."""
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view) and (data := self._next_bytes(len(view) - done)):
            view[done : done + len(data)] = data
            done += len(data)
            self._position += len(data)
        return done

    def _next_bytes(self, count: int) -> bytes:
        """Some bytes from the position on, of one piece."""
        number = bisect_right(self._ends, self._position)
        if number == len(self._pieces):
            return b""
        piece = self._pieces[number]
        left = self._ends[number] - self._position
        if isinstance(piece, bytes):
            return piece[len(piece) - left :][:count]
        self._file.seek(piece[1] - left)
        return self._file.read(min(count, left))


def patched(size: int, patches: dict[int, bytes]) -> list[Piece]:
    """The pieces of a file of `size` bytes some of which are replaced: position -> bytes, none overlapping."""
    pieces: list[Piece] = []
    position = 0
    for start, data in sorted(patches.items()):
        pieces += [(position, start), data]
        position = start + len(data)
    return [*pieces, (position, size)]
