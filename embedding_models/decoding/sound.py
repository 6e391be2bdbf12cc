"""One way into any audio file: which decoder reads it, one downmix, and what is no sound to be embedded."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from embedding_models.decoding.errors import AudioError
from embedding_models.decoding.ffmpeg import FfmpegSource, as_path, has_ffmpeg
from embedding_models.decoding.libsndfile import Refusal, SndfileSource

MIN_SECONDS = 0.5
# A header may count a little more than decoding gives (0.13 s in one of 131 Ogg and Opus files of games, and what an
# encoder puts in front); beyond this the file is cut short.
_MISSING_SECONDS = 0.25
_LARGEST = 1e10  # a sample; files in whole numbers reach 2 ** 31, squares of more would overflow in the encoders
_SIGNATURES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"GIF8", "a picture"),
    (b"\0\x05\x16\x07", "an AppleDouble companion of another file"),
)


class Source(Protocol):
    """A file that a decoder has opened; see `SndfileSource` and `FfmpegSource`."""

    rate: int
    channels: int
    promised: float

    def blocks(self) -> Iterator[np.ndarray]:
        """The sound, (frames, channels) float32 at a time."""


class Sound:
    """The sound of a file, decoded once from front to back. `file` is a path or a binary file object.

    rate and channels (1 or 2) are those of the blocks, known inside `opened`; seconds is how much was decoded so far.
    """

    rate: int
    channels: int

    def __init__(self, file: str | os.PathLike | BinaryIO):
        self.name = str(file) if isinstance(file, (str, os.PathLike)) else str(getattr(file, "name", "audio"))
        self._file = file
        self._frames = 0

    @property
    def seconds(self) -> float:
        """The length of what was decoded so far: after the last block, that of the file."""
        return self._frames / self.rate

    @contextmanager
    def opened(self) -> Iterator[Iterator[np.ndarray]]:
        """The file's blocks, (frames, 1 or 2) float32; more than two channels are averaged to one.

        Raises `AudioError` for what is not audio, is cut short, holds less than 0.5 s or has samples that are not
        finite, on the way in or from a block.
        """
        own = isinstance(self._file, str | os.PathLike)
        try:
            with (
                _opening(self._file) as file,
                _source(file, own, self.name) as source,
            ):
                self.rate, self.channels = source.rate, source.channels if source.channels <= 2 else 1
                yield self._checked(file, own, source)
        except OSError as error:
            raise AudioError("unreadable", f"{self.name}: {error.strerror or error}") from error

    def _checked(self, file: BinaryIO, own: bool, source: Source) -> Iterator[np.ndarray]:
        """The blocks of a source, checked, counted and with 1 or 2 channels."""
        for block in _decoded(source, file, own, self.name):
            largest = float(np.abs(block).max(initial=0))
            if not largest < _LARGEST:
                odd = f"samples up to {largest:g}, expected about -1 to 1"
                text = odd if np.isfinite(largest) else "samples that are not finite (NaN or infinite)"
                raise AudioError("not finite", f"{self.name}: {text}")
            self._frames += len(block)
            yield block if block.shape[1] <= 2 else block.mean(axis=1, keepdims=True)
        if self.seconds < source.promised - _MISSING_SECONDS:
            found = f"{self.seconds:.2f} of {source.promised:.2f} s could be decoded"
            raise AudioError("unreadable", f"{self.name}: truncated or damaged, {found}")
        if self._frames == 0:
            raise AudioError("unreadable", f"{self.name}: an audio file without any sound in it")
        if self.seconds < MIN_SECONDS:
            raise AudioError("too short", f"{self.name}: {self.seconds:.3f} s of audio, expected {MIN_SECONDS} or more")


def _opening(file: str | os.PathLike | BinaryIO) -> AbstractContextManager[BinaryIO]:
    return Path(file).open("rb") if isinstance(file, str | os.PathLike) else nullcontext(file)


@contextmanager
def _source(file: BinaryIO, own: bool, name: str) -> Iterator[Source]:
    """The decoder that reads a file: libsndfile, or ffmpeg for what that refuses."""
    try:
        source = SndfileSource(file, own)
    except Refusal as refusal:
        said = _what_it_is(file)
        if said is not None or not has_ffmpeg():
            raise AudioError("unreadable", f"{name}: not readable as audio ({said or _reason(refusal)})") from refusal
        with as_path(file, own) as path:
            yield FfmpegSource(path, name)
        return
    yield source


def _decoded(source: Source, file: BinaryIO, own: bool, name: str) -> Iterator[np.ndarray]:
    """The blocks of a source; where libsndfile gives up on the way, ffmpeg goes on from there."""
    frames = 0
    try:
        for block in source.blocks():
            frames += len(block)
            yield block
        if frames or not isinstance(source, SndfileSource) or not has_ffmpeg():
            return
    except Refusal as error:
        if not has_ffmpeg():
            place = f"damaged after {frames / source.rate:.2f} s"
            raise AudioError("unreadable", f"{name}: {place} ({_reason(error)})") from error
    with as_path(file, own) as path:
        other = FfmpegSource(path, name)
        if (other.rate, other.channels) != (source.rate, source.channels):
            raise AudioError("unreadable", f"{name}: damaged after {frames / source.rate:.2f} s")
        source.promised = max(source.promised, other.promised)
        for block in other.blocks():
            rest = block[min(frames, len(block)) :]
            frames -= len(block) - len(rest)
            if len(rest):
                yield rest


def _reason(refusal: Exception) -> str:
    """Why libsndfile refuses a file, and that ffmpeg might not."""
    text = str(getattr(refusal, "error_string", refusal)).rstrip(".")
    return f"{'a kind that libsndfile does not know' if 'regular file' in text else text}; ffmpeg is not installed"


def _what_it_is(file: BinaryIO) -> str | None:
    """What a file is that is no audio by its first bytes; None where they do not tell."""
    file.seek(0)
    head = file.read(4096)
    if not head:
        return "an empty file"
    if not any(head) and not _sounds_follow(file):
        return "nothing but zeros"
    if b"<html" in head[:1024].lower() or head.lstrip().lower().startswith(b"<!doctype html"):
        return "an HTML page"
    known = next((text for signature, text in _SIGNATURES if head.startswith(signature)), None)
    return known or ("a text" if _is_text(head) else None)


def _sounds_follow(file: BinaryIO) -> bool:
    """Whether the rest of a file is anything but zeros."""
    while block := file.read(1 << 20):
        if any(block):
            return True
    return False


def _is_text(head: bytes) -> bool:
    text = head.decode("utf-8", "ignore")
    return len(head) - len(text.encode()) < 4 and all(each.isprintable() or each.isspace() for each in text)
