"""Damage is found before HDF5 reads it: a checksum in the file's user block; old files are tried in a child process.

HDF5 (2.0, through h5py 3.16) can hang for ever on one flipped byte in a heap of strings, and gives other flipped
bytes back as text. A store therefore begins with an HDF5 user block, which every reader of HDF5 skips: one line of
text with the CRC-32 of all that never changes once the file is made. What is written later (vectors, statistics,
states) is left out of it, as are its own bytes. `head -1 embeddings.h5` shows it.
"""

import json
import os
import select
import signal
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from common.errors import UserError

BLOCK_BYTES = 4096  # HDF5 wants a power of two from 512; some 20 encoders' spans fit
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_TITLE = b"text-audio-embeddings checksum "
_PIECE = 1 << 22
_OLD_SECONDS = 30  # an old store is tried so long; the strings of all of MusicBench are read in two


def write_checksum(path: Path, changing: Iterable[tuple[int, int]]) -> None:
    """Fill the user block of a file that has its final structure.

    changing: (offset, bytes) of what is written later.
    """
    spans = sorted((offset, size) for offset, size in changing if size)
    size = path.stat().st_size
    text = json.dumps({"bytes": size, "changing": spans, "crc32": _crc(path, spans, size)}, separators=(",", ":"))
    line = _TITLE + f"{zlib.crc32(text.encode()):08x} {text}\n".encode()
    if len(line) > BLOCK_BYTES:
        raise UserError(f"{path}: expected at most {BLOCK_BYTES} bytes of spans, found {len(line)}: too many encoders")
    with open(path, "r+b") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def check_undamaged(path: Path, read: Callable[[], object]) -> None:
    """Raise `UserError` where a store is not as it was written.

    A file without a checksum, made by an older version, is read by `read` in a forked child under a time limit.
    """
    status = path.stat()
    if not _checked(path, status.st_ino, status.st_size, status.st_mtime_ns):
        _try_in_child(path, read)


@lru_cache(maxsize=64)
def _checked(path: Path, _inode: int, size: int, _mtime_ns: int) -> bool:
    """Whether a file is as its checksum says, once for a file that nobody touches; False where it has none."""
    with open(path, "rb") as file:
        block = file.read(BLOCK_BYTES)
    if block.startswith(_SIGNATURE):
        return False
    try:
        if not block.startswith(_TITLE):
            raise ValueError("no store begins like this")
        crc, text = block[len(_TITLE) : block.index(b"\n")].split(b" ", 1)
        if int(crc, 16) != zlib.crc32(text) or block[block.index(b"\n") + 1 :].strip(b"\0"):
            raise ValueError("its first line is damaged")
        about = json.loads(text)
        if size != about["bytes"]:
            raise ValueError(f"truncated: it has {size:,} bytes of {about['bytes']:,}")
        if _crc(path, about["changing"], size) != about["crc32"]:
            raise ValueError("damaged: its checksum differs")
    except ValueError as error:
        raise UserError(
            f"{path}: expected an HDF5 store as prepare_dataset.py wrote it, found a file HDF5 cannot open or must not "
            f"({error}); copy it again, or prepare it again"
        ) from error
    return True


def _crc(path: Path, changing: Iterable[Iterable[int]], size: int) -> int:
    crc = 0
    with open(path, "rb") as file:
        for start, end in _fixed(changing, size):
            file.seek(start)
            while start < end and (piece := file.read(min(_PIECE, end - start))):
                crc, start = zlib.crc32(piece, crc), start + len(piece)
    return crc


def _fixed(changing: Iterable[Iterable[int]], size: int) -> Iterator[tuple[int, int]]:
    """The (start, end) between what changes, after the user block."""
    start = BLOCK_BYTES
    for offset, length in changing:
        yield start, offset
        start = offset + length
    yield start, size


def _try_in_child(path: Path, read: Callable[[], object]) -> None:
    """Read in a forked child first; `UserError` where that hangs or crashes. An exception is left to the caller."""
    ready, done = os.pipe()
    child = os.fork()
    if not child:
        try:
            read()
        finally:
            os._exit(0)  # closes the pipe
    os.close(done)
    try:
        hangs = not select.select([ready], [], [], _OLD_SECONDS)[0]
        if hangs:
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(ready)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        what = f"HDF5 hangs in it for {_OLD_SECONDS} s" if hangs else f"HDF5 crashes in it (signal {-status})"
        raise UserError(f"{path}: expected an HDF5 store, found a damaged one ({what}); copy it or prepare it again")
