"""Audio files as the encoders take them: decoded once, resampled to each rate, cut into windows of 10 s."""

import os
from collections.abc import Collection, Generator, Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
import soxr

from embedding_models.decoding.errors import AudioError
from embedding_models.decoding.sound import MIN_SECONDS, Sound

__all__ = ["MIN_SECONDS", "WINDOW_SECONDS", "AudioError", "AudioFormat", "TrackWindows", "stacked", "track_windows"]

WINDOW_SECONDS = 10


class AudioFormat(NamedTuple):
    """What an encoder listens to: samples per second, and 1 (mono) or 2 (stereo) channels."""

    sample_rate: int
    channels: int


def stacked(windows: Sequence[np.ndarray]) -> np.ndarray:
    """Windows of one format, (channels, samples) each, as an encoder takes them: (n, samples), or (n, 2, samples)."""
    waveforms = np.stack(windows)
    return waveforms[:, 0] if waveforms.shape[1] == 1 else waveforms


class TrackWindows(Iterator[dict[AudioFormat, np.ndarray]]):
    """The windows of a file as they are decoded; see `track_windows`."""

    def __init__(self, file: str | os.PathLike | BinaryIO, formats: Collection[AudioFormat]):
        self._sound = Sound(file)
        self._windows = self._cut(formats)

    @property
    def seconds(self) -> float:
        """How much was decoded so far: with the last window, the file's length, whatever its header says."""
        return self._sound.seconds

    def __next__(self) -> dict[AudioFormat, np.ndarray]:
        return next(self._windows)

    def close(self) -> None:
        """Leave the file."""
        self._windows.close()

    def _cut(self, formats: Collection[AudioFormat]) -> Generator[dict[AudioFormat, np.ndarray]]:
        with self._sound.opened() as blocks:
            yield from _Windows(self._sound.rate, self._sound.channels, formats).cut(blocks)


def track_windows(file: str | os.PathLike | BinaryIO, formats: Collection[AudioFormat]) -> TrackWindows:
    """Decode a file once and yield its windows in every format, each float32 of shape (channels, samples).

    A window lasts ten seconds; the last one is the track's final ten seconds, so that all are equally long.
    A clip under ten seconds is one window of its own length; nothing is padded. The windows of the formats
    cover the same times. The file is read in blocks, so that memory does not grow with its length.

    More than two channels are averaged to one; where stereo is asked for, one channel is taken as both.
    `file` is a path or a binary file object. Raises `AudioError` for what is not audio, is cut short, holds
    less than 0.5 s or has samples that are not finite; windows before the fault may have been yielded.
    """
    return TrackWindows(file, formats)


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
        self._streams = [_Stream(rate, wanted, channels) for wanted in dict.fromkeys(formats)]
        self._channels = channels

    def cut(self, blocks: Iterator[np.ndarray]) -> Iterator[dict[AudioFormat, np.ndarray]]:
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
