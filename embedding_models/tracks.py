"""Whole tracks of any length: decoded ahead, encoded a few windows at a time."""

import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from embedding_models.audio import WINDOW_SECONDS, TrackWindows, stacked, track_windows
from embedding_models.base import AudioEmbeddingModel


def window_starts(windows: int, seconds: float) -> list[float]:
    """Where each of a track's windows starts, in seconds: every ten, the last one ten before the end."""
    last = max(0.0, min(seconds - WINDOW_SECONDS, WINDOW_SECONDS * (windows - 1)))
    return [float(WINDOW_SECONDS * i) for i in range(windows - 1)] + [last]


def embed_track(encoder: AudioEmbeddingModel, path: Path, batch_size: int) -> tuple[TrackWindows, Iterator[np.ndarray]]:
    """A track's windows, and their vectors in order, (up to batch_size, dim) float32 at a time.

    The windows know the track's length, `seconds`, once all vectors are there.

    A thread decodes ahead by one batch, so that two batches of windows at most are in memory. Raises `AudioError`.
    """
    windows = track_windows(path, [encoder.format])
    return windows, _encoded(encoder, _ahead(windows, batch_size), batch_size)


def _encoded(encoder: AudioEmbeddingModel, windows: Iterator, batch_size: int) -> Iterator[np.ndarray]:
    waiting: list[np.ndarray] = []

    def encode() -> np.ndarray:
        waveforms = stacked(waiting)
        waiting.clear()
        return encoder.embed_windows(waveforms).numpy()

    for window in windows:
        waiting.append(window[encoder.format])
        if len(waiting) == batch_size:
            yield encode()
    if waiting:
        yield encode()


def _ahead(items: Iterator, depth: int) -> Iterator:
    """The items, made by a thread that is at most `depth` ahead; an exception there is raised here."""
    made: queue.Queue = queue.Queue(depth)
    left = threading.Event()

    def put(item: object) -> None:
        while not left.is_set():
            try:
                return made.put(item, timeout=0.1)
            except queue.Full:
                continue

    def make() -> None:
        try:
            for item in items:
                put((item, None))
                if left.is_set():
                    return
            put((None, StopIteration()))
        except Exception as error:
            put((None, error))
        finally:
            items.close()

    threading.Thread(target=make, daemon=True).start()
    try:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        left.set()
