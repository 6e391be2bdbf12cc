"""How long encoders take for ten seconds of sound on a device: timed where their weights are here, else arithmetic."""

import os
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import soundfile
import torch

from common.device import choose_device
from common.speed import matmul_tflops
from embedding_models.audio import WINDOW_SECONDS, AudioError, AudioFormat, track_windows
from embedding_models.base import AudioEmbeddingModel
from embedding_models.registry import EncoderSpec
from embedding_models.tracks import embed_track

TIMED_SECONDS = 2.0
USUAL_FORMATS = (AudioFormat(24_000, 1), AudioFormat(44_100, 2))  # of the three published encoders


@dataclass(frozen=True)
class Pace:
    """Seconds that a device takes for a window, in words where that is from, and the width of a vector."""

    seconds: float
    origin: str
    dim: int


class Device:
    """A device whose speed is measured once, when somebody asks."""

    def __init__(self, name: str):
        self.torch = choose_device(name)
        self._tflops: float | None = None

    @property
    def tflops(self) -> float:
        """10^12 operations a second in float32 matrix products."""
        if self._tflops is None:
            self._tflops = matmul_tflops(self.torch, seconds=TIMED_SECONDS)
        return self._tflops


def by_arithmetic(spec: EncoderSpec, device: Device) -> Pace:
    """What an encoder would take at the published size, by its cost in the registry and the device's speed."""
    cost = f"{spec.encoder.tflop:g} TFLOP a window at the published size"
    origin = f"not here, so by arithmetic: {cost}, {device.tflops:.2f} TFLOP/s of matrix products just now"
    return Pace(spec.encoder.tflop / device.tflops, origin, spec.encoder.dim)


def pace_of(spec: EncoderSpec, batch_size: int, device: Device, seconds: float = TIMED_SECONDS) -> Pace:
    """An encoder's own, without decoding. `UserError` where what is here of it is no such model."""
    if not spec.is_here:
        return by_arithmetic(spec, device)
    encoder = spec.load()
    return Pace(time_windows(encoder, batch_size, seconds), "timed just now", encoder.dim)


def time_windows(encoder: AudioEmbeddingModel, batch_size: int, seconds: float = TIMED_SECONDS) -> float:
    """Seconds for a window of noise in batches of up to `batch_size`, timed for about `seconds` (a window at least)."""
    samples = WINDOW_SECONDS * encoder.sample_rate
    rng = np.random.default_rng(0)
    shape = (samples,) if encoder.channels == 1 else (encoder.channels, samples)
    window = rng.normal(0, 0.1, shape).astype(np.float32)
    encoder.embed_windows(window[None, ..., : samples // 10])  # what the first call alone takes
    one = _seconds_of(encoder, window[None])
    if one >= seconds:
        return one
    batch = np.stack([window] * batch_within(one, batch_size, seconds))
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds or not count:
        encoder.embed_windows(batch)
        count += len(batch)
    return elapsed / count


def _seconds_of(encoder: AudioEmbeddingModel, windows: np.ndarray) -> float:
    started = time.perf_counter()
    encoder.embed_windows(windows)
    return time.perf_counter() - started


def batch_within(one: float, batch_size: int, seconds: float) -> int:
    """The largest batch up to `batch_size` that does not take much more than `seconds`, where a window takes `one`."""
    return max(1, min(batch_size, int(seconds / max(one, 1e-9))))


@dataclass(frozen=True)
class TimedTracks:
    """Seconds for a window of real tracks, decoding and averaging included, and how many tracks that was seen on."""

    seconds: float
    tracks: int


def time_tracks(
    encoder: AudioEmbeddingModel, paths: Iterable[Path], batch_size: int, seconds: float = TIMED_SECONDS
) -> TimedTracks:
    """Embed tracks as indexing does, for about `seconds` (a window at least).

    Raises `AudioError`, that of the last track, where none could be decoded.
    """
    batch, taken, windows, tracks = 0, 0.0, 0, 0
    failure: AudioError | None = None
    for path in paths:
        try:
            if not batch:
                one = min(_first_window(encoder, path) for _ in range(2))  # the first does what is done once
                if one >= seconds:
                    return TimedTracks(one, 1)
                batch = batch_within(one, batch_size, seconds)
            started = time.perf_counter()
            for vectors in embed_track(encoder, path, batch)[1]:
                windows += len(vectors)
                if taken + time.perf_counter() - started >= seconds:
                    break
            taken += time.perf_counter() - started
        except AudioError as error:
            failure = error
            continue
        tracks += 1
        if taken >= seconds:
            break
    if failure is not None and not tracks:
        raise failure
    return TimedTracks(taken / max(1, windows), tracks)


def _first_window(encoder: AudioEmbeddingModel, path: Path) -> float:
    started = time.perf_counter()
    next(embed_track(encoder, path, 1)[1])
    return time.perf_counter() - started


def decoding_seconds(paths: Iterable[Path], formats: Collection[AudioFormat], seconds: float = TIMED_SECONDS) -> float:
    """Seconds for decoding a window of real tracks in one thread, timed for about `seconds`; 0 where none can be."""
    taken, windows = 0.0, 0
    for path in paths:
        started = time.perf_counter()
        try:
            for _ in track_windows(path, formats):
                windows += 1
                if taken + time.perf_counter() - started >= seconds:
                    break
        except AudioError:
            continue
        taken += time.perf_counter() - started
        if taken >= seconds:
            break
    return taken / max(1, windows)


def decoding_of_a_clip() -> float:
    """Seconds for decoding ten seconds of mono at 16 kHz, as MusicBench's clips are taken to be, in one thread."""
    clip, rate = BytesIO(), 16_000
    soundfile.write(clip, np.random.default_rng(0).normal(0, 0.1, WINDOW_SECONDS * rate), rate, format="WAV")
    times = []
    for _ in range(5):
        clip.seek(0)
        started = time.perf_counter()
        list(track_windows(clip, USUAL_FORMATS))
        times.append(time.perf_counter() - started)
    return sorted(times)[2]


def together(encoding: float, decoding: float, device: torch.device, decoders: int) -> float:
    """Seconds a window in which encoders take `encoding` on a device and a decoding thread takes `decoding`.

    On CUDA the slower of the two sets the pace. On a CPU both share its cores.
    """
    cores = os.cpu_count() or 1
    if device.type == "cuda":
        return max(encoding, decoding / min(decoders, cores))
    return max(encoding + decoding / cores, decoding / decoders)
