"""Audio files as the encoders take them: decoded once, resampled to each rate, cut into windows of 10 s."""

import os
import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import soundfile
import soxr

WINDOW_SECONDS = 10
MIN_SECONDS = 0.5
_BLOCK_SECONDS = 2
# A lossy file's header may count a little more than decoding gives (0.13 s in one of 131 Ogg and Opus files of games);
# beyond this the file is cut short.
_MISSING_SECONDS = 0.25
_UNKNOWN_SIZE = 0xFFFFFFFF  # what a writer that streams puts where it cannot know a chunk's size


class AudioError(ValueError):
    """A clip that cannot be embedded; `reason` is "unreadable", "too short" or "not finite"."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    # Pickling passes on `args` alone by default, which would fail on the way out of a worker process.
    def __reduce__(self):
        return AudioError, (self.reason, str(self))


class AudioFormat(NamedTuple):
    """What an encoder listens to: samples per second, and 1 (mono) or 2 (stereo) channels."""

    sample_rate: int
    channels: int


def track_windows(
    file: str | os.PathLike | BinaryIO, formats: Collection[AudioFormat]
) -> Iterator[dict[AudioFormat, np.ndarray]]:
    """Decode a file once and yield its windows in every format, each float32 of shape (channels, samples).

    A window lasts ten seconds; the last one is the track's final ten seconds, so that all are equally long.
    A clip under ten seconds is one window of its own length; nothing is padded. The windows of the formats
    cover the same times. The file is read in blocks, so that memory does not grow with its length.

    More than two channels are averaged to one; where stereo is asked for, one channel is taken as both.
    `file` is a path or a binary file object. Raises `AudioError` for what is not audio, is cut short, holds
    less than 0.5 s or has samples that are not finite; windows before the fault may have been yielded.
    """
    name = _name(file)
    try:
        _check_chunk_sizes(file, name)
        with soundfile.SoundFile(file) as sound:
            yield from _Windows(sound.samplerate, sound.channels, formats).cut(_blocks(sound, name), name)
    except OSError as error:
        raise AudioError("unreadable", f"{name}: {error.strerror or error}") from error
    except soundfile.LibsndfileError as error:
        raise AudioError("unreadable", f"{name}: not readable as audio ({error.error_string})") from error


def cut_windows(
    blocks: Iterator[np.ndarray], rate: int, channels: int, formats: Collection[AudioFormat], name: str
) -> Iterator[dict[AudioFormat, np.ndarray]]:
    """The windows, as `track_windows` gives them, of sound that another decoder hands over.

    `blocks` are (frames, 1 or 2) float32 at `rate` samples per second; one channel where `channels` is over 2. `name`
    stands in the errors. Raises `AudioError` for less than 0.5 s.
    """
    yield from _Windows(rate, channels, formats).cut(_long_enough(blocks, rate, name), name)


def _long_enough(blocks: Iterator[np.ndarray], rate: int, name: str) -> Iterator[np.ndarray]:
    decoded = 0
    for block in blocks:
        decoded += len(block)
        yield block
    if decoded < MIN_SECONDS * rate:
        raise AudioError("too short", f"{name}: {decoded / rate:.3f} s of audio, expected {MIN_SECONDS} or more")


def _name(file: str | os.PathLike | BinaryIO) -> str:
    return str(file) if isinstance(file, (str, os.PathLike)) else str(getattr(file, "name", "audio"))


def _blocks(sound: soundfile.SoundFile, name: str) -> Iterator[np.ndarray]:
    """Yield a file's blocks, (frames, 1 or 2) float32, and check that it holds what its header promises."""
    promised, decoded, size = sound.frames, 0, _BLOCK_SECONDS * sound.samplerate
    while len(block := sound.read(size, dtype="float32", always_2d=True)):
        if not np.isfinite(block).all():
            raise AudioError("not finite", f"{name}: samples that are not finite (NaN or infinite)")
        decoded += len(block)
        yield block if block.shape[1] <= 2 else block.mean(axis=1, keepdims=True)
    if decoded < promised - _MISSING_SECONDS * sound.samplerate:
        raise AudioError("unreadable", f"{name}: truncated, {decoded} of {promised} frames could be decoded")
    if decoded == 0:
        raise AudioError("unreadable", f"{name}: an audio file without any sound in it")
    if decoded < MIN_SECONDS * sound.samplerate:
        seconds = decoded / sound.samplerate
        raise AudioError("too short", f"{name}: {seconds:.3f} s of audio, expected {MIN_SECONDS} or more")


class _Stream:
    """One rate and channel count: resamples blocks as they come and keeps the samples still needed.

    `buffer` is (samples, channels); its first sample is number `start` of the resampled track.
    """

    def __init__(self, rate: int, wanted: AudioFormat, channels: int):
        self.format = wanted
        self.length = WINDOW_SECONDS * wanted.sample_rate
        self.start = 0
        self._channels = min(channels, wanted.channels)
        self.buffer = np.empty((0, self._channels), dtype=np.float32)
        self._resampler = None
        if rate != wanted.sample_rate:
            self._resampler = soxr.ResampleStream(rate, wanted.sample_rate, self._channels)

    @property
    def end(self) -> int:
        """Samples of the resampled track there are so far."""
        return self.start + len(self.buffer)

    def add(self, block: np.ndarray, last: bool = False) -> None:
        """Take a block (frames, source channels); `last` lets out what the resampler still holds back."""
        if self._channels < block.shape[1]:
            block = block.mean(axis=1, keepdims=True)
        if self._resampler is not None:
            block = self._resampler.resample_chunk(np.ascontiguousarray(block), last=last)
        self.buffer = np.concatenate([self.buffer, block.reshape(-1, self._channels)])

    def window(self, start: int, stop: int) -> np.ndarray:
        """Give samples [start, stop) as (channels, samples)."""
        samples = self.buffer[start - self.start : stop - self.start].T
        return np.array(np.broadcast_to(samples, (self.format.channels, samples.shape[1])), order="C")

    def forget_before(self, start: int) -> None:
        """Drop the samples before number `start`."""
        self.buffer, self.start = self.buffer[start - self.start :], start


class _Windows:
    """Cuts the streams of one file alike.

    How many windows there are is settled by the source's own frames, so that rounding in a resampler cannot
    give one format a window more than another.
    """

    def __init__(self, rate: int, channels: int, formats: Collection[AudioFormat]):
        self._length = WINDOW_SECONDS * rate
        channels = channels if channels <= 2 else 1  # as `_blocks` gives them
        self._streams = [_Stream(rate, wanted, channels) for wanted in dict.fromkeys(formats)]
        self._channels = channels

    def cut(self, blocks: Iterator[np.ndarray], name: str) -> Iterator[dict[AudioFormat, np.ndarray]]:
        frames, given = 0, 0
        for block in blocks:
            frames += len(block)
            for stream in self._streams:
                stream.add(block)
            # The last window is placed by the track's end: one goes out only when more is known to follow.
            while frames > (given + 1) * self._length and self._all_reach(given + 1):
                yield self._window(given)
                given += 1
        for stream in self._streams:
            stream.add(np.empty((0, self._channels), dtype=np.float32), last=True)
        while frames > (given + 1) * self._length:
            yield self._window(given)
            given += 1
        whole = frames < self._length
        yield {s.format: s.window(0 if whole else s.end - s.length, s.end) for s in self._streams}

    def _all_reach(self, windows: int) -> bool:
        return all(stream.end >= windows * stream.length for stream in self._streams)

    def _window(self, index: int) -> dict[AudioFormat, np.ndarray]:
        window = {s.format: s.window(index * s.length, (index + 1) * s.length) for s in self._streams}
        for stream in self._streams:  # the final ten seconds may begin anywhere in the window just given
            stream.forget_before(index * stream.length)
        return window


def _check_chunk_sizes(file: str | os.PathLike | BinaryIO, name: str) -> None:
    """Raise `AudioError` for a WAV or AIFF file that ends before its sound does.

    libsndfile takes such a file for a shorter one. Both formats are a row of chunks: a four-letter name, a
    size of four bytes (little-endian in WAV, big-endian in AIFF), and that many bytes, padded to be even.
    """
    if isinstance(file, (str, os.PathLike)):
        with Path(file).open("rb") as opened:
            return _check_chunk_sizes(opened, name)
    file.seek(0, os.SEEK_END)
    total = file.tell()
    file.seek(0)
    magic = file.read(12)
    order, sound = {b"RIFF": ("<", b"data"), b"FORM": (">", b"SSND")}.get(magic[:4], ("", b""))
    position = 12
    while order and position + 8 <= total:
        file.seek(position)
        chunk, size = struct.unpack(f"{order}4sI", file.read(8))
        position += 8 + size + size % 2
        if chunk == sound and size != _UNKNOWN_SIZE and total < position - size % 2:
            missing = position - size % 2 - total
            raise AudioError("unreadable", f"{name}: truncated, {missing} of {size} bytes are missing")
    file.seek(0)
