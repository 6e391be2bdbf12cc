"""The plain vectors of a library, kept beside its index: float16 rows in flat files, and a catalogue of the tracks.

    FOLDER/SPACE/vectors.f16        (rows, D) float16, little-endian, a row per track
    FOLDER/SPACE/windows.f16        the same, a row per ten-second window (--moments)
    FOLDER/SPACE/catalogue.sqlite   which file each row was made from, its tags, and what the vectors are

A row is written and flushed to disk before the catalogue names it, and no row that the catalogue names is ever
written over: a process killed at any instant leaves whole tracks alone.

SQLite has no checksums: a flipped bit in a path or in an index would be read as it is. So a writer that ends notes the
CRC-32 of the whole catalogue in SQLite's own field for a user's number (user_version), and every change sets that to 0.
What was written by an older version, or by a process that was killed, has 0 there and is read without a check.
"""

import os
import re
import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np

from common.errors import UserError

DTYPE = np.dtype("<f2")
ONCE_SHARED = "data/library.vectors"
# (offset, bytes) in the header that noting the checksum changes: SQLite's counter of changes, the checksum itself,
# the counter once more with SQLite's version
_NOT_COUNTED = ((24, 4), (60, 4), (92, 8))
_SPACE_KEYS = ("space", "dim", "recipe", "encoder", "revision")
_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS tracks (
    id INTEGER PRIMARY KEY, path TEXT UNIQUE NOT NULL, size INTEGER, mtime_ns INTEGER, hash BLOB,
    title TEXT, artist TEXT, album TEXT, duration REAL, row INTEGER UNIQUE NOT NULL, version INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS windows (
    track INTEGER NOT NULL, start REAL NOT NULL, row INTEGER PRIMARY KEY, version INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS windows_of_track ON windows (track);
CREATE INDEX IF NOT EXISTS tracks_by_hash ON tracks (hash);
"""


@dataclass(frozen=True)
class Track:
    """A track of the catalogue; `row` is its vector's, `version` grows with every change to the track."""

    id: int
    path: str
    size: int
    mtime_ns: int
    hash: bytes
    title: str
    artist: str
    album: str
    duration: float
    row: int = -1
    version: int = 0


@dataclass(frozen=True)
class Window:
    """A window of a track: where it starts in seconds, and the row of its vector."""

    track: int
    start: float
    row: int
    version: int


_COLUMNS = ", ".join(field.name for field in fields(Track))
_MARKS = ", ".join("?" for _ in fields(Track))


def vectors_folder(uri: str) -> Path:
    """Where the plain vectors of an index are kept, unless it says else.

    `data/library.vectors` for the folder `data/library.db`, `data/HOST_PORT_DATABASE.vectors` for a server.
    """
    if "://" not in uri:
        return Path(uri).with_suffix(".vectors")
    server = uri.split("://", 1)[1].rpartition("@")[2]
    return Path("data") / (re.sub(r"[^\w.-]+", "_", server).strip("_.") + ".vectors")


def kept_vectors(uri: str, identity: dict | None) -> Path:
    """Where the plain vectors of a library are: `vectors_folder`, or for a server where its index notes that they are.

    identity: what the index notes, None where there is none yet. Libraries on servers once shared one folder; where
    an index notes nothing and that folder is there, it is still that library's.
    """
    if "://" not in uri or identity is None:
        return vectors_folder(uri)
    noted = Path(identity.get("vectors", ONCE_SHARED))
    return noted if noted.is_dir() else vectors_folder(uri)


class VectorFiles:
    """The vectors and the catalogue of one audio space. One process writes, others may read.

    Opened with `space` alone for reading; a writer gives the whole of `about` ({space, dim, recipe, encoder,
    revision}), by which the files are made where they are missing. Raises `UserError` where they are missing, or
    hold vectors of something else.
    """

    def __init__(self, folder: str | Path, space: str, about: dict | None = None):
        self.folder = Path(folder) / space
        catalogue = self.folder / "catalogue.sqlite"
        if about is None and not catalogue.is_file():
            raise UserError(f"{self.folder}: no plain vectors there; expected those that index_library.py keeps")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(catalogue, timeout=60)
        self._notes_checksum = False
        try:
            status = catalogue.stat()
            noted = _is_as_noted(catalogue, status.st_ino, status.st_size, status.st_mtime_ns)
            if about is not None:
                if not noted:
                    self._require_sound()
                self._database.executescript(_TABLES)
                self._settle(about)
                self._notes_checksum |= not noted
            self.about = self._read_about()
            self.dim = int(self.about["dim"])
            self._version = self._highest_version()
        except (sqlite3.DatabaseError, KeyError, ValueError) as error:
            raise UserError(f"{catalogue}: expected a catalogue of index_library.py ({error})") from error
        self._free: dict[str, Iterator[int]] = {}

    def _require_sound(self) -> None:
        """`ValueError` where SQLite finds fault with a catalogue that has no checksum and is about to be given one."""
        ((found,),) = self._database.execute("PRAGMA integrity_check(1)")
        if found != "ok":
            raise ValueError(" ".join(found.split()))

    def _settle(self, about: dict) -> None:
        """Note what the vectors are, or check that they are it."""
        found = self._read_about()
        wanted = {key: str(about.get(key) or "") for key in _SPACE_KEYS}
        for key, value in wanted.items():
            if found and found.get(key) != value:
                raise UserError(
                    f"{self.folder}: holds vectors of {key} {found.get(key)!r}, expected {value!r}; they have to "
                    f"be computed again: remove that folder, or name another with --vectors-dir"
                )
        if not found:
            with self._changing():
                self._database.executemany("INSERT OR IGNORE INTO meta VALUES (?, ?)", wanted.items())

    def _read_about(self) -> dict:
        return dict(self._database.execute("SELECT key, value FROM meta"))

    def _highest_version(self) -> int:
        highest = "SELECT max(version) FROM "
        return max(self._database.execute(highest + table).fetchone()[0] or 0 for table in ("tracks", "windows"))

    def close(self) -> None:
        """Close the catalogue; where it was changed, note its checksum. `UserError` where that cannot be written."""
        notes, self._notes_checksum = self._notes_checksum, False
        with closing(self._database):
            if notes:
                self._note_checksum()

    def _note_checksum(self) -> None:
        try:
            with self._database:
                self._database.execute("BEGIN IMMEDIATE")
                self._database.execute(f"PRAGMA user_version = {_checksum(self._database)}")
        except sqlite3.DatabaseError as error:
            raise UserError(f"{self.folder / 'catalogue.sqlite'}: could not be written ({error})") from error

    def __enter__(self) -> "VectorFiles":
        return self

    def __exit__(self, _kind: object, error: object, _trace: object) -> None:
        self._notes_checksum &= not isinstance(error, sqlite3.DatabaseError)  # what is damaged is not to look whole
        self.close()

    # reading

    def _ask(self, query: str, values: tuple = ()) -> Iterator[tuple]:
        """The rows of an answer; `UserError` where the catalogue turns out to be damaged."""
        try:
            yield from self._database.execute(query, values)
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the latter from what SQLite says of the damage
            self._notes_checksum = False
            reason = " ".join(str(error).split())
            raise UserError(
                f"{self.folder / 'catalogue.sqlite'}: expected a catalogue of index_library.py, found a damaged one "
                f"({reason}); remove {self.folder} and index again"
            ) from error

    @property
    def vectors(self) -> np.ndarray:
        """The tracks' vectors, (rows, dim) float16, mapped; rows no track names may hold anything."""
        return self._map("vectors")

    @property
    def windows(self) -> np.ndarray:
        """The windows' vectors, (rows, dim) float16, mapped."""
        return self._map("windows")

    def _map(self, name: str) -> np.ndarray:
        path = self.folder / f"{name}.f16"
        rows = path.stat().st_size // (DTYPE.itemsize * self.dim) if path.is_file() else 0
        if rows == 0:
            return np.zeros((0, self.dim), DTYPE)
        return np.memmap(path, DTYPE, "r", shape=(rows, self.dim))

    def __len__(self) -> int:
        return next(self._ask("SELECT count(*) FROM tracks"))[0]

    def tracks(self) -> Iterator[Track]:
        """Every track, by row."""
        for values in self._ask(f"SELECT {_COLUMNS} FROM tracks ORDER BY row"):
            yield Track(*values)

    def find(self, **where: object) -> Track | None:
        """The first track with this column of this value."""
        ((column, value),) = where.items()
        found = next(self._ask(f"SELECT {_COLUMNS} FROM tracks WHERE {column} = ? LIMIT 1", (value,)), None)
        return Track(*found) if found else None

    def rows_of(self, ids: Iterable[int]) -> dict[int, int]:
        """The rows of tracks, by id, of those that are there."""
        rows = {}
        for each in ids:
            if found := next(self._ask("SELECT row FROM tracks WHERE id = ?", (each,)), None):
                rows[each] = found[0]
        return rows

    def windows_of(self, track: int | None = None) -> Iterator[Window]:
        """The windows of a track in their order; of every track by row, where none is named."""
        where, values = ("WHERE track = ? ORDER BY start", (track,)) if track is not None else ("ORDER BY row", ())
        for found in self._ask(f"SELECT track, start, row, version FROM windows {where}", values):
            yield Window(*found)

    def has_windows(self, track: int) -> bool:
        """Whether a track's windows are kept."""
        return next(self._ask("SELECT 1 FROM windows WHERE track = ?", (track,)), None) is not None

    def count_windows(self) -> int:
        """How many windows are kept, of all tracks."""
        return next(self._ask("SELECT count(*) FROM windows"))[0]

    @property
    def holds_windows(self) -> bool:
        """Whether windows are kept of any track."""
        return next(self._ask("SELECT 1 FROM windows LIMIT 1"), None) is not None

    # writing

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """A transaction, with which the checksum goes; `close` notes a new one."""
        self._notes_checksum = True
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.execute("PRAGMA user_version = 0")
            yield

    def write(self, name: str, vectors: np.ndarray) -> list[int]:
        """Write vectors (n, dim) to free rows of "vectors" or "windows"; they count once `put` names them.

        Raises `ValueError` for a value that float16 cannot hold.
        """
        with np.errstate(over="ignore"):  # told below
            rows = np.asarray(vectors).astype(DTYPE)
        if not np.isfinite(rows).all():
            raise ValueError("a vector does not fit float16")
        numbers = [next(self._free_rows(name)) for _ in rows]
        path = self.folder / f"{name}.f16"
        path.touch()
        with open(path, "r+b") as file:
            for number, row in zip(numbers, rows, strict=True):
                file.seek(number * row.nbytes)
                file.write(row.tobytes())
            file.flush()
            os.fsync(file.fileno())
        return numbers

    def _free_rows(self, name: str) -> Iterator[int]:
        if name not in self._free:
            table = "tracks" if name == "vectors" else "windows"
            used = {row for (row,) in self._database.execute(f"SELECT row FROM {table}")}
            top = max(used, default=-1) + 1
            gaps = [row for row in range(top) if row not in used]
            self._free[name] = (row for part in (gaps, _count_from(top)) for row in part)
        return self._free[name]

    def put(self, track: Track, windows: list[tuple[float, int]] | None = None) -> None:
        """Name a track's row, in the place of the track with its id; windows: (start, row), None leaves what is there.

        Rows that become free are used again by a later run only, when nothing can refer to them.
        """
        self._version += 1
        with self._changing():
            values = (*astuple(track)[:-1], self._version)
            self._database.execute(f"INSERT OR REPLACE INTO tracks ({_COLUMNS}) VALUES ({_MARKS})", values)
            if windows is not None:
                self._database.execute("DELETE FROM windows WHERE track = ?", (track.id,))
                rows = [(track.id, start, row, self._version) for start, row in windows]
                self._database.executemany("INSERT INTO windows VALUES (?, ?, ?, ?)", rows)

    def rename(self, old: int, new: int, path: str) -> None:
        """Give a track, with its windows, another id and path."""
        self._version += 1
        with self._changing():
            self._database.execute(
                "UPDATE tracks SET id = ?, path = ?, version = ? WHERE id = ?", (new, path, self._version, old)
            )
            self._database.execute(
                "UPDATE windows SET track = ?, version = ? WHERE track = ?", (new, self._version, old)
            )

    def remove(self, ids: Iterable[int]) -> None:
        """Take tracks and their windows out of the catalogue."""
        with self._changing():
            for each in ids:
                self._database.execute("DELETE FROM tracks WHERE id = ?", (each,))
                self._database.execute("DELETE FROM windows WHERE track = ?", (each,))


@lru_cache(maxsize=64)
def _is_as_noted(path: Path, _inode: int, _size: int, _mtime_ns: int) -> bool:
    """Whether a catalogue is as its checksum says, looked at once for a file that nobody touches; False without one.

    Raises `ValueError` where it differs.
    """
    with closing(sqlite3.connect(path, timeout=60)) as database:
        database.execute("BEGIN")  # so that a writer waits
        (noted,) = database.execute("PRAGMA user_version").fetchone()
        if noted and noted != _checksum(database):
            raise ValueError("damaged: its checksum differs")
    return bool(noted)


def _checksum(database: sqlite3.Connection) -> int:
    """The CRC-32 of a database as SQLite keeps it in user_version: signed, and not 0."""
    content, crc, start = memoryview(database.serialize()), 0, 0
    for offset, size in _NOT_COUNTED:
        crc, start = zlib.crc32(content[start:offset], crc), offset + size
    crc = zlib.crc32(content[start:], crc) or 1
    return crc - (1 << 32) if crc >> 31 else crc


def _count_from(number: int) -> Iterator[int]:
    while True:
        yield number
        number += 1
