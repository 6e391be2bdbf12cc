"""Where the bytes of the recordings come from: a streamed tar, an extracted folder, or people's own files."""

import gzip
import hashlib
import os
import tarfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Self, cast

from common import hub
from common.errors import UserError
from store.reading import DIGEST_BYTES

TAR_NAMES = ("MusicBench.tar.gz", "MusicBench.tar")
ROOTS = ("datashare", ".", "MusicBench/datashare", "MusicBench")

_BUFFER = 1 << 17  # bytes; larger ones were slower
_GZIP_MAGIC = b"\x1f\x8b"

Progress = Callable[[int], None]


def no_progress(position: int) -> None:
    """The default of `read`: tell nobody."""


def sound_digest(audio: bytes | Path) -> bytes | None:
    """What identifies a recording's sound: BLAKE2b of the bytes of its file, given or to be read; None if it cannot be.

    The bytes, not the decoded samples: they are read anyway and cost a thousandth of the encoders' time, and a vector
    that is there does not become wrong because a decoder rounds otherwise. A file whose tags were edited counts as
    another sound, so that its vectors are computed again: too often rather than too seldom.
    """
    if isinstance(audio, bytes):
        return hashlib.blake2b(audio, digest_size=DIGEST_BYTES).digest()
    try:
        with open(audio, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)).digest()
    except OSError:  # the decoder, who opens it next, says so
        return None


class ClipSource(ABC):
    """What the sources have in common; see `read`.

    stable_ids: whether an audio id stays with its recording when the metadata change, as a path does.
    """

    stable_ids = True

    def prepare(self) -> None:  # noqa: B027 - most sources have nothing to fetch
        """Fetch what `read` needs and is not here yet."""

    @property
    @abstractmethod
    def size_bytes(self) -> int:
        """The position that `progress` reaches at the end of a full pass. Call after `prepare`."""

    @abstractmethod
    def read(self, wanted: set[str], progress: Progress = no_progress) -> Iterator[tuple[str, bytes | Path]]:
        """Yield (audio id, file content or path) once for each wanted id that is there, in the source's order.

        Calls `progress` with the position reached, in bytes. After a complete pass, what was not yielded is
        missing. Raises UserError where the source is damaged, after yielding what came before.
        """


class FileClips(ClipSource):
    """Files on disk. `paths` gives the path of each audio id; the order is that of the mapping."""

    def __init__(self, paths: dict[str, Path]):
        self.paths = paths

    @property
    def size_bytes(self) -> int:
        """Bytes of all the files that are there."""
        return sum(_size(path) or 0 for path in self.paths.values())

    def read(self, wanted: set[str], progress: Progress = no_progress) -> Iterator[tuple[str, bytes | Path]]:
        """Yield (audio id, path); files that are not wanted count as passed. See `ClipSource.read`."""
        position = 0
        for audio_id, path in self.paths.items():
            size = _size(path)
            if size is None:
                continue
            if audio_id in wanted:
                yield audio_id, path
            position += size
            progress(position)


class TarClips(ClipSource):
    """A tar, gzipped or not, read from front to back without extracting; only wanted members are kept in memory.

    A member belongs to a wanted id if its path is that id, or ends in it after a slash (MusicBench's members
    begin with "datashare/"); of several, the first counts. The pass ends as soon as all wanted ids were seen.
    """

    def __init__(self, path: Path):
        self.path = path

    @property
    def size_bytes(self) -> int:
        """Size of the tar as it is, so compressed bytes for a gzipped one."""
        return self.path.stat().st_size

    def read(self, wanted: set[str], progress: Progress = no_progress) -> Iterator[tuple[str, bytes | Path]]:
        """Yield (audio id, content). See `ClipSource.read`."""
        open_ids = set(wanted)
        if not open_ids:
            return
        try:
            raw = open(self.path, "rb")  # noqa: SIM115 - closed below
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        with raw:
            yield from self._members(raw, open_ids, progress)

    def _members(self, raw: BinaryIO, open_ids: set[str], progress: Progress) -> Iterator[tuple[str, bytes]]:
        last = "the start"
        try:
            stream = cast(BinaryIO, _plain_stream(raw))  # tarfile asks of a stream no more than `read`
            with tarfile.open(fileobj=stream, mode="r|", bufsize=_BUFFER, tarinfo=_StrictTarInfo) as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined] # tarfile keeps every member for seeking back, which a stream cannot do
                    _refuse_unsafe(self.path, member)
                    last = member.name
                    audio_id = _wanted_id(member.name, open_ids) if member.isreg() else None
                    if audio_id is not None:
                        open_ids.remove(audio_id)
                        content = cast(BinaryIO, tar.extractfile(member)).read()  # a regular file has some
                        yield audio_id, content
                    progress(raw.tell())
                    if not open_ids:
                        return
            while stream.read(_BUFFER):  # up to the end, where gzip checks its sum
                pass
        except (EOFError, OSError, tarfile.TarError, zlib.error) as error:
            raise UserError(
                f"{self.path}: damaged or cut short after byte {raw.tell():,} of {self.size_bytes:,}, at {last}"
                f" ({error}); fetch the file again, the recordings already done are kept"
            ) from error
        progress(raw.tell())


class HubTarClips(TarClips):
    """A tar in a data set on the hub, downloaded by `prepare` (resumed where it stopped)."""

    def __init__(self, repo_id: str, filename: str, revision: str):
        self._arguments = (repo_id, filename, revision)

    def prepare(self) -> None:
        """Download the tar unless it is in the hub's cache."""
        repo_id, filename, revision = self._arguments
        self.path = hub.fetch_file(repo_id, filename, revision=revision, repo_type="dataset")


def folder_or_tar(folder: Path, audio_ids: list[str]) -> ClipSource:
    """The audio of a MusicBench folder: the extracted tree or the tar.

    The tree is taken if it holds all of `audio_ids`, or if there is no tar: an interrupted extraction must not
    turn into missing recordings while the tar is at hand. Raises UserError where there is neither.
    """
    counts = {root: _count_files(os.path.join(folder, root), audio_ids) for root in ROOTS}
    root = max(counts, key=counts.__getitem__)
    tars = [folder / name for name in TAR_NAMES if (folder / name).is_file()]
    if tars and counts[root] < len(audio_ids):
        return TarClips(tars[0])
    if counts[root] == 0:
        raise UserError(
            f"--dataset {folder}: expected the audio as {TAR_NAMES[0]} or extracted (for example"
            f" {folder / ROOTS[0] / audio_ids[0] if audio_ids else folder / ROOTS[0]}); found neither"
        )
    return FileClips({audio_id: folder / root / audio_id for audio_id in audio_ids})


def _count_files(root: str, audio_ids: list[str]) -> int:
    """How many of the ids are files under `root`; plain strings, for pathlib takes seconds for 53,000 of them."""
    tops = {audio_id.split("/", 1)[0] for audio_id in audio_ids}
    if not any(os.path.exists(os.path.join(root, top)) for top in tops):
        return 0
    return sum(os.path.isfile(os.path.join(root, audio_id)) for audio_id in audio_ids)


class _StrictTarInfo(tarfile.TarInfo):
    """Makes a damaged header an error: tarfile itself takes one for the end of the archive.

    A sound archive ends in a block of zeros; a file that merely stops, or goes on with something that is no
    header, is damaged.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise  # the regular end
            raise tarfile.ReadError(f"{error}" if buf else "the archive's end mark is missing") from error


class _Decompressed:
    """A gzip stream that gives what it has before it fails: a full read would throw away what came before a cut."""

    def __init__(self, raw: BinaryIO):
        self._gzip = gzip.GzipFile(fileobj=raw)

    def read(self, size: int) -> bytes:
        """Give some bytes, up to `size`; none at the end."""
        return self._gzip.read1(size)


def _plain_stream(raw: BinaryIO) -> BinaryIO | _Decompressed:
    """The uncompressed bytes of a file that may be gzipped, judged by its first two bytes, not by its name."""
    magic = raw.read(2)
    raw.seek(0)
    return _Decompressed(raw) if magic == _GZIP_MAGIC else raw


def _refuse_unsafe(path: Path, member: tarfile.TarInfo) -> None:
    """Raise UserError for a member that is neither a file nor a folder, or whose name leaves the archive's root."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise UserError(f"{path}: expected plain files and folders, found an unsafe path: {member.name!r}")
    if not (member.isreg() or member.isdir()):
        raise UserError(f"{path}: expected plain files and folders, found a link or device: {member.name!r}")


def _wanted_id(name: str, wanted: set[str]) -> str | None:
    """The id that `name` is, or ends in after a slash."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    candidates = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((candidate for candidate in candidates if candidate in wanted), None)


def _size(path: Path) -> int | None:
    """Bytes of a file, None where there is none."""
    return path.stat().st_size if os.path.isfile(path) else None  # isfile, unlike Path's, takes over-long names
