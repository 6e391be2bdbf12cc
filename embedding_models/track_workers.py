"""Encoder processes for whole libraries: paths go in, vectors come out, in one process or several."""

import multiprocessing
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from embedding_models.audio import AudioError
from embedding_models.averaging import WindowMean
from embedding_models.base import AudioEmbeddingModel
from embedding_models.registry import EncoderSpec
from embedding_models.tracks import embed_track, window_starts


@dataclass(frozen=True)
class Part:
    """Vectors (n, dim) float32 of a track's next windows, in order."""

    key: Hashable
    vectors: np.ndarray


@dataclass(frozen=True)
class End:
    """A track's end: the mean over its windows (dim,) float32, where they start, and its length, in seconds."""

    key: Hashable
    mean: np.ndarray
    starts: list[float]
    seconds: float


@dataclass(frozen=True)
class Failure:
    """A track that cannot be embedded, and why, in one line. Parts of it may have come before."""

    key: Hashable
    reason: str


Event = Part | End | Failure


def embed_one(
    encoder: AudioEmbeddingModel, key: Hashable, path: Path, batch_size: int, windows: bool
) -> Iterator[Event]:
    """Embed one track: its `Part`s, where `windows` are wanted, then its `End`, or a `Failure`."""
    mean = WindowMean()
    try:
        track, parts = embed_track(encoder, path, batch_size)
        for vectors in parts:
            mean.add(vectors)
            if windows:
                yield Part(key, vectors)
    except AudioError as error:
        text = str(error) if str(path) in str(error) else f"{path}: {error}"  # the encoder knows no file
        yield Failure(key, " ".join(text.split()))
    except OSError as error:
        yield Failure(key, f"{path}: {error.strerror or error}")
    else:
        yield End(key, mean.mean(), window_starts(mean.count, track.seconds), track.seconds)


def embed_tracks(
    tracks: Iterable[tuple[Hashable, Path]],
    encoder: AudioEmbeddingModel,
    spec: EncoderSpec,
    processes: int,
    batch_size: int,
    windows: bool,
) -> Iterator[Event]:
    """Embed tracks as they come; the events of one track are in order, those of several may be mixed.

    With one process `encoder` does it here; with more, each loads `spec` for itself. CUDA devices are dealt out in
    turn where `spec.device` is "auto" or "cuda". Raises `UserError` where a process dies.
    """
    if processes == 1:
        for key, path in tracks:
            yield from embed_one(encoder, key, path, batch_size, windows)
        return
    workers = [_Worker(_on_device(spec, number), batch_size, windows, processes) for number in range(processes)]
    try:
        yield from _deal(iter(tracks), workers)
    finally:
        for worker in workers:
            worker.stop()


def _on_device(spec: EncoderSpec, number: int) -> EncoderSpec:
    devices = torch.cuda.device_count()
    if spec.device in ("auto", "cuda") and devices:
        return replace(spec, device=f"cuda:{number % devices}")
    return spec


class _Worker:
    """An encoder process and our end of its pipe. It ends when our end closes, however that comes about."""

    def __init__(self, spec: EncoderSpec, batch_size: int, windows: bool, processes: int):
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, spec, batch_size, windows, processes), daemon=True)
        self._process.start()
        other.close()
        self.path: Path | None = None

    def give(self, tracks: Iterator[tuple[Hashable, Path]]) -> bool:
        """Hand over the next track; False where there is none."""
        if (track := next(tracks, None)) is None:
            return False
        self.path = track[1]
        try:
            self.pipe.send(track)
        except OSError:
            raise self.gone() from None
        return True

    def gone(self) -> UserError:
        """The error of a process that has died."""
        return UserError(f"{self.path}: the encoder process that had it died; the same command goes on")

    def stop(self) -> None:
        """End the process."""
        self.pipe.close()
        self._process.terminate()
        self._process.join()


def _deal(tracks: Iterator[tuple[Hashable, Path]], workers: list[_Worker]) -> Iterator[Event]:
    busy = {worker.pipe: worker for worker in workers if worker.give(tracks)}
    while busy:
        for pipe in wait(list(busy)):
            try:
                event = pipe.recv()
            except (EOFError, OSError):
                raise busy[pipe].gone() from None
            if isinstance(event, UserError):
                raise event
            yield event
            if not isinstance(event, Part) and not busy[pipe].give(tracks):
                del busy[pipe]


def _serve(pipe: Connection, spec: EncoderSpec, batch_size: int, windows: bool, processes: int) -> None:
    """An encoder process: answers each (key, path) with the events of that track until the pipe closes."""
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    try:
        encoder = spec.load()
        while True:
            key, path = pipe.recv()
            for event in embed_one(encoder, key, path, batch_size, windows):
                pipe.send(event)
    except UserError as error:
        pipe.send(error)
    except (EOFError, OSError, KeyboardInterrupt):
        return
