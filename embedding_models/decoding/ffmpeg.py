"""What ffmpeg decodes, in a process of its own and through a pipe: every channel, at the file's own rate."""

import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, BinaryIO

import numpy as np

from embedding_models.decoding.errors import AudioError

_BLOCK_FRAMES = 1 << 16
# Containers that keep their length; in others (ADTS, MP3, chained Ogg) ffprobe takes it from the bit rate or less.
_TRUSTED = frozenset(("mov", "matroska", "asf", "wv", "ape", "tta", "caf"))
# The bytes of a file must not make ffmpeg open anything else: a playlist can name other files and addresses.
_READING = ("-protocol_whitelist", "file")


def has_ffmpeg() -> bool:
    """Whether ffmpeg and ffprobe can be called."""
    return bool(shutil.which("ffmpeg") and shutil.which("ffprobe"))


class FfmpegSource:
    """A file that ffmpeg reads. rate: samples per second; channels: as many as the file has.

    promised: the length in seconds that the container keeps, 0 where it keeps none. Raises `AudioError`.
    """

    def __init__(self, path: str, name: str):
        self._path, self._name = path, name
        self.rate, self.channels, self.promised = _probe(path, name)

    def blocks(self) -> Iterator[np.ndarray]:
        """The sound, (frames, channels) float32 at a time. Raises `AudioError` where ffmpeg gives up."""
        words = ["ffmpeg", "-v", "error", "-nostdin", *_READING, "-i", f"file:{self._path}", "-map", "0:a:0"]
        form = ["-ac", str(self.channels), "-ar", str(self.rate), "-f", "f32le", "-"]
        process = subprocess.Popen(
            [*words, *form], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
        )
        assert process.stdout is not None and process.stderr is not None  # noqa: PT018 - they are pipes
        said: list[bytes] = []
        listener = threading.Thread(
            target=lambda stream: said.append(_last_of(stream)), args=(process.stderr,), daemon=True
        )
        listener.start()
        size = 4 * self.channels
        try:
            while data := process.stdout.read(size * _BLOCK_FRAMES):
                yield np.frombuffer(data[: len(data) // size * size], "<f4").reshape(-1, self.channels)
            code = process.wait()
            listener.join()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        if code != 0:
            raise AudioError("unreadable", f"{self._name}: ffmpeg could not decode it whole{_said(b''.join(said))}")


def _last_of(stream: IO[bytes]) -> bytes:
    """The end of what a process says; it is read to the end, so that the process never waits."""
    with stream:
        kept = b""
        while data := stream.read(1 << 12):
            kept = (kept + data)[-2000:]
        return kept


@contextmanager
def as_path(file: BinaryIO, own: bool) -> Iterator[str]:
    """The path of an open file; where it was not opened by one, that of a copy for as long as it is needed."""
    if own:
        yield os.path.abspath(file.name)
        return
    with tempfile.NamedTemporaryFile(prefix="audio-") as copy:
        file.seek(0)
        shutil.copyfileobj(file, copy)
        copy.flush()
        yield copy.name


def _probe(path: str, name: str) -> tuple[int, int, float]:
    """Sample rate, channels and seconds of a file's first audio stream, as ffprobe has them."""
    words = ["ffprobe", "-v", "error", *_READING, "-select_streams", "a:0", "-show_streams", "-show_format"]
    answer = subprocess.run(
        [*words, "-of", "json", f"file:{path}"], capture_output=True, stdin=subprocess.DEVNULL, check=False
    )
    try:
        content = json.loads(answer.stdout)
        stream = content["streams"][0]
        rate, channels = int(stream["sample_rate"]), int(stream["channels"])
        if rate < 1 or channels < 1:
            raise ValueError(f"{rate} Hz, {channels} channels")
        return rate, channels, _kept_seconds(stream, content.get("format", {}))
    except (ValueError, KeyError, IndexError) as error:
        raise AudioError("unreadable", f"{name}: ffprobe found no audio in it{_said(answer.stderr)}") from error


def _kept_seconds(stream: dict, container: dict) -> float:
    """The length of the audio stream as the container keeps it; the container's own where there is but that stream."""
    if container.get("format_name", "").split(",")[0] not in _TRUSTED:
        return 0.0
    alone = container.get("duration") if container.get("nb_streams") == 1 else None
    try:
        return float(stream.get("duration") or alone or 0)
    except ValueError:
        return 0.0


def _said(stderr: bytes) -> str:
    lines = stderr.decode(errors="replace").strip().splitlines()
    return f" ({lines[-1][:200]})" if lines else ""
