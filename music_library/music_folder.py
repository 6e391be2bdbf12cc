"""A folder of music: the audio files in it, what identifies them, and their tags."""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mutagen
import soundfile

from embedding_models.decoding.ffmpeg import has_ffmpeg

# fmt: off
_LIBSNDFILE_KINDS = {
    ".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".mp2", ".aif", ".aiff", ".aifc", ".au", ".snd", ".w64",
    ".rf64", ".caf",
}
_FFMPEG_KINDS = {
    ".m4a", ".m4b", ".m4r", ".mp4", ".aac", ".wma", ".wv", ".ape", ".mka", ".webm", ".weba", ".mpc", ".tta", ".tak",
    ".ac3", ".eac3", ".dts", ".dsf", ".dff", ".amr", ".spx",
}
_OTHER_KINDS = {  # without sound, or locked
    ".mid", ".midi", ".kar", ".xm", ".s3m", ".sid", ".nsf", ".aa", ".aax", ".m4p", ".cda",
}
# fmt: on
READABLE_KINDS = _LIBSNDFILE_KINDS | _FFMPEG_KINDS
"""Suffixes of the files that can be read, with ffmpeg at the latest."""
KINDS = READABLE_KINDS | _OTHER_KINDS
"""Suffixes of the files that are looked at; what is in them decides how they are read."""
NEEDS_FFMPEG, NOT_READ = "a kind that ffmpeg reads, which is not installed", "a kind that is not read"
"""Why whole kinds of files are left out: too many to name each."""

_PASSED_OVER = re.compile(  # folders of bins, versions, snapshots and systems, where copies of music lie
    r"""\$recycle\.bin|recycler|recycled|\.trash(-.*|es)?|trash-\d+|@eadir|[#@]recycle|[#@]snapshot|\.snapshots?|\.zfs
    |@recently-snapshot|\.@__thumb|\.stversions|\.stfolder|\.sync|\.dropbox\.cache|\.deleted|\.git|\.svn|\.hg|\.bzr
    |system\ volume\ information|lost\+found|__macosx|\.appledouble|\.spotlight-v100|\.fseventsd|\.temporaryitems
    |\.documentrevisions-v100|\.mobilebackups|\.thumbnails""",
    re.IGNORECASE | re.VERBOSE,
)
_NAMES = {  # of tags: mutagen's easy ones, ID3 in WAV and AIFF, ASF, APE
    "title": ("title", "TIT2", "Title"),
    "artist": ("artist", "TPE1", "Author", "Artist"),
    "album": ("album", "TALB", "WM/AlbumTitle", "Album"),
}
_HASH_BLOCK = 1 << 20


@dataclass(frozen=True)
class Tags:
    """What a file says of itself; `duration` in seconds, 0 where it does not tell."""

    title: str
    artist: str
    album: str
    duration: float


def track_id(path: Path) -> int:
    """A track's number, 63 bits of a hash of its resolved path: the same as long as the file stays where it is."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=8).digest()) >> 1


def content_hash(path: Path) -> bytes:
    """16 bytes of BLAKE2b over the file's content."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.digest()


class MusicFolder:
    """The audio files below a folder, by the one path that each has: `..` and links are resolved.

    Links to folders are followed, each folder once, so that a loop of links ends. Companions, bins, versions and
    system folders are passed over. `roots` are the folder and those that links led to, as far as it was walked.
    """

    def __init__(self, folder: Path):
        self.roots = [folder.resolve()]
        self._folders: set[tuple[int, int]] = set()
        self._files: set[Path] = set()

    def __iter__(self) -> Iterator[tuple[Path, str | None]]:
        """The files by name, each with None, or with why it is left out; folders that cannot be read as well."""
        waiting = [self.roots[0]]
        while waiting:
            current = waiting.pop()
            try:
                state = os.stat(current)
                if (state.st_dev, state.st_ino) in self._folders:
                    continue
                self._folders.add((state.st_dev, state.st_ino))
                entries = sorted(os.scandir(current), key=lambda entry: entry.name)
            except OSError as error:
                yield current, error.strerror or str(error)
                continue
            folders: list[Path] = []
            for entry in entries:
                yield from self._look_at(current, entry, folders)
            waiting += reversed(folders)

    def _look_at(self, current: Path, entry: os.DirEntry, folders: list[Path]) -> Iterator[tuple[Path, str | None]]:
        """An entry's file; a folder joins `folders`."""
        path = current / entry.name
        try:
            if entry.is_dir():
                if not _PASSED_OVER.fullmatch(entry.name):
                    folders.append(path.resolve() if entry.is_symlink() else path)
                    self.roots += folders[-1:] if entry.is_symlink() else []
            elif path.suffix.lower() in KINDS and not entry.name.startswith("._"):
                reason = _fault(path)
                if reason is None and entry.is_symlink():
                    path = path.resolve()
                if path not in self._files:
                    self._files.add(path)
                    yield path, reason
        except OSError as error:  # a link to itself
            yield path, error.strerror or str(error)


def _fault(path: Path) -> str | None:
    kind = path.suffix.lower()
    if kind in _OTHER_KINDS:
        return NOT_READ
    if kind in _FFMPEG_KINDS and not has_ffmpeg():
        return NEEDS_FFMPEG
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
    texts = {key: _first(file, key) for key in _NAMES}
    if not texts["title"]:
        texts = {key: texts[key] or text for key, text in _text_chunks(path).items()}
    duration = float(getattr(getattr(file, "info", None), "length", 0) or 0)
    return Tags(texts["title"] or " ".join(path.stem.split()), texts["artist"], texts["album"], duration)


def _text_chunks(path: Path) -> dict[str, str]:
    """The text chunks of WAV, AIFF and CAF, which mutagen does not read, as far as libsndfile knows them."""
    found: dict[str, str] = {}
    try:
        with open(path, "rb", buffering=0) as file:
            if file.read(4) in (b"RIFF", b"RF64", b"FORM", b"riff", b"caff"):
                file.seek(0)
                with soundfile.SoundFile(file.fileno(), closefd=False) as sound:
                    found = sound.copy_metadata()
    except (soundfile.SoundFileRuntimeError, OSError):
        pass
    return {key: _one_line(found.get(key, "")) for key in _NAMES}


def _first(file: mutagen.FileType | None, key: str) -> str:
    """The first text of a tag, by whichever name the file has for it."""
    if file is None:
        return ""
    for name in _NAMES[key]:
        try:
            values = file.get(name) or []
            if text := _one_line(values[0]):
                return text
        except (KeyError, ValueError, TypeError, IndexError):
            continue
    return ""


def _one_line(text: object) -> str:
    return " ".join(str(text).encode("utf-8", "replace").decode().split())
