"""Whole tracks of any length: opened by soundfile or ffmpeg, decoded ahead, encoded a few windows at a time."""

import json
import queue
import shutil
import subprocess
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import soundfile

from embedding_models.audio import WINDOW_SECONDS, AudioError, AudioFormat, cut_windows, track_windows
from embedding_models.base import AudioEmbeddingModel

_FFMPEG_SUFFIXES = frozenset((".m4a", ".mp4", ".aac", ".wma"))  # libsndfile knows none of their codecs
_BLOCK_FRAMES = 1 << 16
_DURATION_TOLERANCE = 2.0  # seconds that a container may promise more than its stream holds


def needs_ffmpeg(path: Path) -> bool:
    """Whether a file of this name is read by ffmpeg: its codec is one that libsndfile was not built with."""
    suffix = path.suffix.lower()
    return suffix in _FFMPEG_SUFFIXES or (suffix == ".opus" and "OPUS" not in soundfile.available_subtypes("OGG"))


def open_track(path: Path, formats: Collection[AudioFormat]) -> tuple[float, Iterator[dict[AudioFormat, np.ndarray]]]:
    """A track's length in seconds, as its header has it, and its windows as `track_windows` gives them.

    Raises `AudioError` for what is not audio, here or while the windows are read.
    """
    if needs_ffmpeg(path):
        rate, channels, seconds = _probe(path)
        blocks = _ffmpeg_blocks(path, rate, channels, seconds)
        return seconds, cut_windows(blocks, rate, channels, formats, str(path))
    try:
        info = soundfile.info(str(path))
    except soundfile.LibsndfileError as error:
        raise AudioError("unreadable", f"{path}: not readable as audio ({error.error_string})") from error
    return info.frames / info.samplerate, track_windows(path, formats)


def window_starts(windows: int, seconds: float) -> list[float]:
    """Where each of a track's windows starts, in seconds: every ten, the last one ten before the end."""
    last = max(0.0, min(seconds - WINDOW_SECONDS, WINDOW_SECONDS * (windows - 1)))
    return [float(WINDOW_SECONDS * i) for i in range(windows - 1)] + [last]


def embed_track(encoder: AudioEmbeddingModel, path: Path, batch_size: int) -> tuple[float, Iterator[np.ndarray]]:
    """A track's length in seconds, and its windows' vectors in order, (up to batch_size, dim) float32 at a time.

    A thread decodes ahead by one batch, so that two batches of windows at most are in memory. Raises `AudioError`.
    """
    seconds, windows = open_track(path, [encoder.format])
    return seconds, _encoded(encoder, _ahead(windows, batch_size), batch_size)


def _encoded(encoder: AudioEmbeddingModel, windows: Iterator, batch_size: int) -> Iterator[np.ndarray]:
    waiting: list[np.ndarray] = []

    def encode() -> np.ndarray:
        waveforms = np.stack(waiting)
        waiting.clear()
        return encoder.embed_windows(waveforms[:, 0] if encoder.channels == 1 else waveforms).numpy()

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


def _probe(path: Path) -> tuple[int, int, float]:
    """Sample rate, channels and seconds of a file's first audio stream, as ffprobe has them."""
    if not (shutil.which("ffmpeg") and shutil.which("ffprobe")):
        raise AudioError("unreadable", f"{path}: files of this kind are read by ffmpeg, which is not installed")
    words = ["ffprobe", "-v", "error", "-select_streams", "a:0", "-show_streams", "-show_format", "-of", "json"]
    answer = subprocess.run([*words, f"file:{path}"], capture_output=True, stdin=subprocess.DEVNULL, check=False)
    try:
        content = json.loads(answer.stdout)
        stream = content["streams"][0]
        seconds = stream.get("duration") or content.get("format", {}).get("duration") or 0
        return int(stream["sample_rate"]), int(stream["channels"]), float(seconds)
    except (ValueError, KeyError, IndexError) as error:
        raise AudioError("unreadable", f"{path}: ffprobe found no audio in it{_said(answer.stderr)}") from error


def _ffmpeg_blocks(path: Path, rate: int, channels: int, seconds: float) -> Iterator[np.ndarray]:
    """Decode by ffmpeg at the file's own rate to blocks (frames, 1 or 2) float32, through a pipe."""
    count = min(channels, 2)
    mixed = ["-ac", "1"] if channels > 2 else ["-ac", str(channels)]
    count = 1 if channels > 2 else count
    words = ["ffmpeg", "-v", "error", "-nostdin", "-i", f"file:{path}", "-map", "0:a:0", *mixed, "-ar", str(rate)]
    process = subprocess.Popen(
        [*words, "-f", "f32le", "-"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    said: list[bytes] = []
    listener = threading.Thread(target=lambda: said.append(process.stderr.read()[:2000]), daemon=True)
    listener.start()
    decoded = 0
    try:
        while data := process.stdout.read(4 * count * _BLOCK_FRAMES):
            block = np.frombuffer(data[: len(data) // (4 * count) * (4 * count)], "<f4").reshape(-1, count)
            if not np.isfinite(block).all():
                raise AudioError("not finite", f"{path}: samples that are not finite (NaN or infinite)")
            decoded += len(block)
            yield block
        code = process.wait()
        listener.join()
    finally:
        process.kill()
        process.wait()
    if code != 0 or any(said):
        raise AudioError("unreadable", f"{path}: ffmpeg could not decode it whole{_said(b''.join(said))}")
    if decoded < (seconds - _DURATION_TOLERANCE) * rate:
        raise AudioError("unreadable", f"{path}: truncated, {decoded / rate:.1f} of {seconds:.1f} s could be decoded")


def _said(stderr: bytes) -> str:
    lines = stderr.decode(errors="replace").strip().splitlines()
    return f" ({lines[-1][:200]})" if lines else ""
