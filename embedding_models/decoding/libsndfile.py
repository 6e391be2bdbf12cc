"""What libsndfile decodes: every stream of a file, to its end, whatever its header counts."""

import os
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import soundfile

from embedding_models.decoding.headers import Header, read_header
from embedding_models.decoding.mpeg import mpeg_streams
from embedding_models.decoding.ogg import chained_streams
from embedding_models.decoding.views import ByteReader, Piece, Spliced

BLOCK_SECONDS = 2
_COUNT_UNKNOWN = 1 << 60  # libsndfile's count of frames is near 2 ** 63 where it knows none

Refusal = soundfile.SoundFileRuntimeError
"""What is raised for a file that libsndfile does not read, here or while it is decoded."""


class _ForwardOnly(soundfile.SoundFile):
    """soundfile seeks to where it is after every block, which fails at the end of a FLAC without a count of samples."""

    def seekable(self) -> bool:
        """Not as far as soundfile is concerned."""
        return False


class SndfileSource:
    """A file that libsndfile opens. rate: samples per second; channels: as many as the file has.

    promised: seconds that the header counts. Raises `Refusal` for a file it does not read, or whose streams differ
    in rate or channels. `own` says that the file was opened here, by its path: then libsndfile reads it by itself.
    """

    def __init__(self, file: BinaryIO, own: bool):
        self._file, self._own = file, own
        reader = ByteReader(file)
        self._size = reader.size
        self._header = read_header(reader)
        self._streams = [self._header.pieces] if self._header.pieces else _streams(reader)
        with self._open(self._streams[0]) as sound:
            self.rate, self.channels = sound.samplerate, sound.channels
        self.promised = (self._header.frames or 0) / self.rate

    def blocks(self) -> Iterator[np.ndarray]:
        """The sound, (frames, channels) float32 at a time. `promised` is complete at the end."""
        for number, stream in enumerate(self._streams):
            with self._open(stream) as sound:
                if (sound.samplerate, sound.channels) != (self.rate, self.channels):
                    raise Refusal(f"part {number + 1} of {len(self._streams)} has another rate or channels")
                self.promised += _promised(self._header, sound.frames) / self.rate
                while len(block := sound.read(BLOCK_SECONDS * self.rate, dtype="float32", always_2d=True)):
                    yield block

    def _open(self, pieces: list[Piece] | None) -> soundfile.SoundFile:
        if pieces is None and self._own:
            os.lseek(self._file.fileno(), 0, os.SEEK_SET)
            return _ForwardOnly(self._file.fileno(), closefd=False)
        # libsndfile may ask for a place before the beginning, which a file of Python's answers with a traceback
        return _ForwardOnly(Spliced(self._file, [(0, self._size)] if pieces is None else pieces))


def _promised(header: Header, counted: int) -> float:
    """Frames that a stream's header promises, by what libsndfile counts; 0 where it has been asked or nobody knows."""
    return 0 if header.frames is not None or counted > _COUNT_UNKNOWN else counted * header.promised


def _streams(reader: ByteReader) -> list[list[Piece] | None]:
    """The streams of a file one after another; None for a file that is to be read as it is."""
    links = chained_streams(reader) if reader.at(0, 4) == b"OggS" else []
    if len(links) > 1:
        return [[link] for link in links]
    head = reader.at(0, 3)
    if head != b"ID3" and not (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0):
        return [None]
    streams = mpeg_streams(reader)
    if len(streams) == 1 and len(streams[0].runs) == 1 and (streams[0].counted or 0) >= streams[0].frames:
        return [None]
    return [stream.pieces() for stream in streams] or [None]
