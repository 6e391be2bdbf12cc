"""A folder of music: the audio files in it, what identifies them, and their tags."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mutagen
import soundfile

SUFFIXES = frozenset(
    (".wav", ".flac", ".ogg", ".oga", ".mp3", ".aif", ".aiff", ".m4a", ".mp4", ".aac", ".opus", ".wma")
)
_INFO_SUFFIXES = frozenset((".wav", ".aif", ".aiff"))
_HASH_BLOCK = 1 << 20


@dataclass(frozen=True)
class Tags:
    """What a file says of itself; `duration` in seconds, 0 where it does not tell."""

    title: str
    artist: str
    album: str
    duration: float


def track_id(path: Path) -> int:
    """A track's number, 63 bits of a hash of its absolute path: the same as long as the file stays where it is."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=8).digest()) >> 1


def content_hash(path: Path) -> bytes:
    """16 bytes of BLAKE2b over the file's content."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.digest()


def audio_files(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """The audio files below a folder by name, each with None, or with why it is left out.

    Links to folders are followed, each folder once, so that a loop of links ends. Folders that cannot be read are
    given as well, with their reason.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [folder.absolute()]
    while waiting:
        current = waiting.pop()
        try:
            state = os.stat(current)
            if (state.st_dev, state.st_ino) in seen:
                continue
            seen.add((state.st_dev, state.st_ino))
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
        except OSError as error:
            yield current, error.strerror or str(error)
            continue
        folders = []
        for entry in entries:
            path = current / entry.name
            try:
                if entry.is_dir():
                    folders.append(path)
                elif path.suffix.lower() in SUFFIXES:
                    yield path, _fault(path)
            except OSError as error:  # a link to itself
                yield path, error.strerror or str(error)
        waiting += reversed(folders)


def _fault(path: Path) -> str | None:
    try:
        os.fspath(path).encode("utf-8")
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    try:
        return None if path.is_file() else "no file (a broken link, a loop of links or a device)"
    except OSError as error:
        return error.strerror or str(error)


def read_tags(path: Path) -> Tags:
    """Title, artist, album and duration from a file's tags; without a title it is the file's name.

    Tags are an extra: a file whose tags cannot be read has none.
    """
    try:
        file = mutagen.File(path, easy=True)
    except Exception:  # mutagen fails on a broken file in as many ways as it can be broken
        file = None
    if not _first(file, "title") and path.suffix.lower() in _INFO_SUFFIXES:
        file = _InfoTags(path)  # text chunks of WAV and AIFF, which mutagen does not read
    duration = float(getattr(getattr(file, "info", None), "length", 0) or 0)
    title = _first(file, "title") or " ".join(path.stem.split())
    return Tags(title, _first(file, "artist"), _first(file, "album"), duration)


class _InfoTags:
    """The text chunks of a WAV or AIFF file, as far as libsndfile knows them."""

    def __init__(self, path: Path):
        self.info, self._texts = None, {}
        try:
            with soundfile.SoundFile(str(path)) as sound:
                self._texts = sound.copy_metadata()
        except (soundfile.LibsndfileError, OSError):
            return

    def get(self, key: str) -> list[str]:
        """The text of a tag, alone in a list."""
        return [self._texts[key]] if self._texts.get(key) else []


def _first(file, key: str) -> str:
    try:
        values = (file.get(key) if file is not None else None) or []
        return " ".join(str(values[0]).encode("utf-8", "replace").decode().split())
    except (KeyError, ValueError, TypeError, IndexError):
        return ""
