"""Audio files in, vectors out: decoding in worker threads, windows of equal length encoded in batches.

soundfile, soxr and numpy release the interpreter's lock while they work, so threads are enough to keep the
encoders fed and nothing is pickled. Memory is bounded by the queues, not by the length of a recording.
"""

import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedding_models.audio import AudioError, AudioFormat, stacked, track_windows
from embedding_models.averaging import WindowMean
from embedding_models.base import AudioEmbeddingModel, Embedding

Clip = tuple[Hashable, bytes | Path]  # the caller's key, and a file's content or its path
Windows = dict[AudioFormat, np.ndarray]  # one window in every format asked for, (channels, samples)
Vectors = dict[str, np.ndarray]  # space name -> (dim,) float32
Wanted = Callable[[Hashable], Collection[str]]  # the spaces that are asked for of a key

_END = object()


@dataclass
class StageSeconds:
    """Where the time went: `decode` summed over the workers, `encode` on the encoders' device."""

    decode: float = 0.0
    wait: float = 0.0
    encode: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    write: float = 0.0  # left to the caller, who writes


class _Stopped(Exception):
    """The consumer has left; the thread that meets this ends."""


class _Decoders:
    """One reading thread and `workers` decoding threads behind a bounded queue of windows.

    Iterating gives (key, window) for each window, then (key, number of windows | AudioError) for its end.
    When the source of clips fails, what was read before is still decoded and given; then the error is raised.

    formats: those that a key's windows are needed in; what is needed in none is not decoded and has no windows.
    """

    def __init__(
        self, clips: Iterable[Clip], formats: Callable[[Hashable], set[AudioFormat]], workers: int, depth: int
    ):
        self._clips, self._formats, self._workers = clips, formats, workers
        self._files: queue.Queue = queue.Queue(2 * workers)
        self._windows: queue.Queue = queue.Queue(depth)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._seconds = [0.0] * workers
        targets = [(self._read, ())] + [(self._decode, (worker,)) for worker in range(workers)]
        for target, arguments in targets:
            threading.Thread(target=target, args=arguments, daemon=True).start()

    @property
    def seconds(self) -> float:
        """Seconds spent decoding and resampling, summed over the workers."""
        return sum(self._seconds)

    def stop(self) -> None:
        """Let the threads end; they notice within a tenth of a second."""
        self._stop.set()

    def __iter__(self) -> Iterator[tuple[Hashable, Windows | int | AudioError]]:
        ended = 0
        while ended < self._workers:
            item = self._windows.get()
            if item is _END:
                ended += 1
            else:
                yield item
        if self._error is not None:
            raise self._error

    def _wait(self, attempt: Callable[..., Any]) -> Any:
        """Repeat a queue's put or get until it succeeds or the consumer has left."""
        while not self._stop.is_set():
            try:
                return attempt(timeout=0.1)
            except (queue.Full, queue.Empty):
                continue
        raise _Stopped

    def _put(self, target: queue.Queue, item: object) -> None:
        self._wait(lambda timeout: target.put(item, timeout=timeout))

    def _read(self) -> None:
        try:
            try:
                for key, audio in self._clips:
                    if formats := self._formats(key):
                        self._put(self._files, (key, audio, formats))
                    else:
                        self._put(self._windows, (key, 0))
            except Exception as error:
                self._error = error
            for _ in range(self._workers):
                self._put(self._files, _END)
        except _Stopped:
            return

    def _decode(self, worker: int) -> None:
        try:
            try:
                while (clip := self._wait(self._files.get)) is not _END:
                    self._decode_clip(worker, *clip)
            except _Stopped:
                raise
            except Exception as error:
                self._error = error
            self._put(self._windows, _END)
        except _Stopped:
            return

    def _decode_clip(self, worker: int, key: Hashable, audio: bytes | Path, formats: set[AudioFormat]) -> None:
        count, started = 0, time.perf_counter()
        try:
            for window in track_windows(BytesIO(audio) if isinstance(audio, bytes) else audio, formats):
                self._seconds[worker] += time.perf_counter() - started
                self._put(self._windows, (key, window))
                count, started = count + 1, time.perf_counter()
        except AudioError as error:
            self._put(self._windows, (key, error))
        else:
            self._put(self._windows, (key, count))


@dataclass
class _Track:
    """A recording on its way through the encoders: the means of its windows' vectors so far."""

    means: dict[str, WindowMean] = field(default_factory=lambda: defaultdict(WindowMean))
    encoded: int = 0
    windows: int | None = None  # how many there are, known once it has been decoded to its end
    error: AudioError | None = None

    def take(self, space: str, outcome: np.ndarray | AudioError) -> None:
        """Add one window's vector in one space, or keep why there is none."""
        if isinstance(outcome, AudioError):
            self.error = outcome
        else:
            self.means[space].add(outcome)

    @property
    def complete(self) -> bool:
        """Nothing more will come of it: decoded to its end, and every window encoded or not worth it."""
        return self.windows is not None and (self.error is not None or self.encoded == self.windows)

    @property
    def result(self) -> Vectors | AudioError:
        """The mean over the windows in each space, or why there is none."""
        return self.error or {name: mean.mean() for name, mean in self.means.items()}


Finished = list[tuple[Hashable, Vectors | AudioError]]


Batch = list[tuple[Hashable, Windows]]


@dataclass
class _Running:
    """A batch that has been given to the encoders, and what each of them has begun or why it would not.

    `live` are the windows that the encoders were given: those of `batch` whose recording had not failed by then.
    """

    batch: Batch
    live: Batch
    embeddings: list[tuple[AudioEmbeddingModel, Embedding | AudioError]] = field(default_factory=list)


class _Batcher:
    """Groups windows of equal length, runs each batch through its encoders, and averages per recording.

    Where an encoder runs ahead of us (on CUDA), a batch's vectors are taken when the next batch has been begun, so
    that the device has work while they are looked at and written.
    """

    def __init__(self, encoders: Sequence[AudioEmbeddingModel], wanted: Wanted, batch_size: int, seconds: StageSeconds):
        self._encoders, self._wanted, self._batch_size, self._seconds = encoders, wanted, batch_size, seconds
        self._tracks: dict[Hashable, _Track] = {}
        self._waiting: dict[tuple, Batch] = defaultdict(list)
        self._running: _Running | None = None

    def add(self, key: Hashable, item: Windows | int | AudioError) -> Finished:
        """Take one thing from the decoders; return the recordings that it completed."""
        track = self._tracks.setdefault(key, _Track())
        if isinstance(item, dict):
            group = frozenset(self._wanted(key)), *(window.shape[-1] for window in item.values())
            self._waiting[group].append((key, item))
            return self._relieve(group)
        if isinstance(item, AudioError):
            track.error, item = item, track.encoded
        track.windows = item
        return self._completed([key])

    def flush(self) -> Iterator[Finished]:
        """Encode what is left; each list is one batch's completed recordings."""
        for group in list(self._waiting):
            yield self._encode(group)
        yield self._take(self._running)

    def _relieve(self, group: tuple) -> Finished:
        """Encode the group that is full, or the largest where many odd lengths have piled up."""
        if len(self._waiting[group]) < self._batch_size:
            if sum(map(len, self._waiting.values())) < 4 * self._batch_size:
                return []
            group = max(self._waiting, key=lambda key: len(self._waiting[key]))
        return self._encode(group)

    def _encode(self, group: tuple) -> Finished:
        """Begin a group's batch; take the vectors of the one before, or of this one where no encoder runs ahead."""
        wanted = [encoder for encoder in self._encoders if encoder.name in group[0]]
        begun = self._begin(wanted, self._waiting.pop(group))
        if not any(encoder.runs_ahead for encoder in self._encoders):
            return self._take(begun)
        finished, self._running = self._take(self._running), begun
        return finished

    def _begin(self, encoders: list[AudioEmbeddingModel], batch: Batch) -> _Running:
        # A recording that broke off while its first windows waited here is no longer among the tracks.
        batch = [(key, windows) for key, windows in batch if key in self._tracks]
        live = [(key, windows) for key, windows in batch if self._tracks[key].error is None]
        running = _Running(batch, live)
        copied: dict[tuple[AudioFormat, torch.device], torch.Tensor] = {}
        for encoder in encoders if live else ():
            place = encoder.format, encoder.device
            if place not in copied:
                copied[place] = encoder.to_device(_stacked(live, encoder))
            try:
                running.embeddings.append((encoder, encoder.begin(copied[place])))
            except AudioError as error:
                running.embeddings.append((encoder, error))
        return running

    def _take(self, running: _Running | None) -> Finished:
        """Add a batch's vectors to their recordings; the recordings that it completed."""
        if running is None:
            return []
        for encoder, embedding in running.embeddings:
            outcomes = self._outcomes(encoder, embedding, running.live)
            for (key, _), outcome in zip(running.live, outcomes, strict=True):
                if (track := self._tracks.get(key)) is not None and track.error is None:
                    track.take(encoder.name, outcome)
        known = [key for key, _ in running.batch if key in self._tracks]
        for key in known:
            self._tracks[key].encoded += 1
        return self._completed(known)

    def _outcomes(
        self, encoder: AudioEmbeddingModel, embedding: Embedding | AudioError, batch: Batch
    ) -> list[np.ndarray | AudioError]:
        """A vector for each window of a batch, or why there is none."""
        try:
            if isinstance(embedding, AudioError):
                raise embedding
            vectors = embedding.vectors().numpy()
            self._seconds.encode[encoder.name] += embedding.seconds
            return list(vectors)
        except AudioError as error:
            if len(batch) == 1:
                return [error]
        outcomes: list[np.ndarray | AudioError] = []
        for single in batch:  # find the one that fails; the others are kept
            try:
                begun = encoder.begin(_stacked([single], encoder))
            except AudioError as error:
                outcomes.append(error)
                continue
            outcomes += self._outcomes(encoder, begun, [single])
        return outcomes

    def _completed(self, keys: Iterable[Hashable]) -> Finished:
        finished = []
        for key in dict.fromkeys(keys):
            if self._tracks[key].complete:
                finished.append((key, self._tracks.pop(key).result))
        return finished


def _stacked(batch: Batch, encoder: AudioEmbeddingModel) -> torch.Tensor:
    """Windows as one tensor of the shape that an encoder takes, in pinned memory for CUDA."""
    waveforms = torch.from_numpy(stacked([windows[encoder.format] for _, windows in batch]))
    return waveforms.pin_memory() if encoder.device.type == "cuda" else waveforms


def embed_clips(
    clips: Iterable[Clip],
    encoders: Sequence[AudioEmbeddingModel],
    batch_size: int,
    num_workers: int,
    seconds: StageSeconds,
    wanted: Wanted | None = None,
) -> Iterator[Finished]:
    """Embed recordings as they come; yield lists of (key, vectors | AudioError), one list per encoded batch.

    Each file is decoded once for all encoders. Every key is yielded exactly once, in no fixed order.
    `wanted` tells, once a key's clip has been read, of which encoders (by name) vectors are asked for; without it of
    all. A clip that is wanted by none comes back, undecoded, with no vectors.
    `seconds` is filled in as time passes. An error of the source itself (a cut archive) is raised at the end,
    after everything that was read before it has been yielded.
    """
    names = [encoder.name for encoder in encoders]
    wanted = wanted or (lambda _: names)

    def formats(key: Hashable) -> set[AudioFormat]:
        asked = wanted(key)
        return {encoder.format for encoder in encoders if encoder.name in asked}

    decoders = _Decoders(clips, formats, num_workers, depth=2 * batch_size)
    batcher = _Batcher(encoders, wanted, batch_size, seconds)
    failure = None
    items = iter(decoders)
    try:
        while True:
            started = time.perf_counter()
            try:
                item = next(items, None)
            except Exception as error:
                failure, item = error, None
            seconds.wait += time.perf_counter() - started
            seconds.decode = decoders.seconds
            if item is None:
                break
            if finished := batcher.add(*item):
                yield finished
        yield from filter(None, batcher.flush())
        if failure is not None:
            raise failure
    finally:
        decoders.stop()
