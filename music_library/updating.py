"""Bringing the plain vectors of a library up to date with its folder, and Milvus up to date with them."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np

from common.errors import UserError
from music_library.index_space import IndexSpace
from music_library.milvus_index import AUTO, FIELD, IndexChoice, VectorDatabase, is_local
from music_library.music_folder import NEEDS_FFMPEG, NOT_READ, MusicFolder, content_hash, read_tags, track_id
from music_library.searching import check_identity, moments_collection
from music_library.vector_files import Track, VectorFiles

_ROWS_AT_ONCE_ELEMENTS = 1 << 24  # float32 elements standardised and sent at once: 64 MB


@dataclass
class Changes:
    """What a walk over the folder found.

    todo: files to be embedded. unchanged, touched (same content), moved (content known from another path): tracks
    that need no encoder. left_out: what cannot be read, with its reason; kinds: reason -> suffix ->
    how many, of kinds that are not read. roots: the folders that were walked, `unread` what of them could not be.
    """

    todo: list[Track] = field(default_factory=list)
    present: set[int] = field(default_factory=set)
    unchanged: int = 0
    touched: int = 0
    moved: int = 0
    left_out: list[str] = field(default_factory=list)
    unread: list[Path] = field(default_factory=list)
    kinds: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    roots: list[Path] = field(default_factory=list)

    @property
    def count_left_out(self) -> int:
        """Files that are left out, those of whole kinds as well."""
        return len(self.left_out) + sum(kinds.total() for kinds in self.kinds.values())

    def lines(self) -> Iterator[str]:
        """What is left out: a line for each file, and one for all those of kinds that are not read."""
        yield from self.left_out
        for reason, kinds in self.kinds.items():
            found = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
            yield f"{kinds.total()} files of {reason}: {found}"


def look_through(folder: Path, files: VectorFiles, moments: bool, step: Callable[[], object]) -> Changes:
    """Compare a folder with the catalogue, and mend what needs no encoder; `step` is called for every file.

    A file of the size and time that are noted is unchanged; else its content decides, by hash. With `moments` a
    track whose windows are not kept is to be embedded.
    """
    _resolve_paths(files)
    walk = MusicFolder(folder)
    changes = Changes(roots=walk.roots)
    for path, reason in walk:
        step()
        if reason is None:
            try:
                _look_at(path, files, moments, changes)
            except OSError as error:
                reason = error.strerror or str(error)
        if reason is not None:
            changes.present.add(track_id(path))
            changes.unread.append(path)
            if reason in (NEEDS_FFMPEG, NOT_READ):
                changes.kinds[reason][path.suffix.lower()] += 1
                continue
            changes.left_out.append(f"{printable(path)}: {reason}")
    return changes


def _resolve_paths(files: VectorFiles) -> None:
    """Put the tracks of an index under the paths that they have without links, each once, with their vectors."""
    for track in list(files.tracks()):
        path = os.path.realpath(track.path)
        if path != track.path:
            number = track_id(Path(path))
            if files.find(id=number) is None:
                files.rename(track.id, number, path)
            else:
                files.remove([track.id])


def printable(path: Path) -> str:
    """A path in one line of text, whatever is in its name."""
    return repr(str(path))[1:-1] if not str(path).isprintable() else str(path)


def _look_at(path: Path, files: VectorFiles, moments: bool, changes: Changes) -> None:
    number = track_id(path)
    changes.present.add(number)
    state = path.stat()
    known = files.find(id=number)
    if known is not None and known.path != str(path):
        raise UserError(f"{path}: has the same id as {known.path}; rename one of them")
    complete = known if known is not None and (not moments or files.has_windows(number)) else None
    if complete and (complete.size, complete.mtime_ns) == (state.st_size, state.st_mtime_ns):
        changes.unchanged += 1
        return
    digest, tags = content_hash(path), read_tags(path)
    track = Track(number, str(path), state.st_size, state.st_mtime_ns, digest, *vars(tags).values())
    if complete and complete.hash == digest:
        files.put(replace(track, row=complete.row, duration=complete.duration))
        changes.touched += 1
        return
    twin = files.find(hash=digest)
    if twin is not None and (not moments or files.has_windows(twin.id)):
        _copy(files, twin, track)
        changes.moved += 1
        return
    changes.todo.append(track)


def _copy(files: VectorFiles, twin: Track, track: Track) -> None:
    """Give a track the vectors of another one with the same content."""
    (row,) = files.write("vectors", files.vectors[[twin.row]])
    windows = [
        (window.start, files.write("windows", files.windows[[window.row]])[0]) for window in files.windows_of(twin.id)
    ]
    files.put(replace(track, row=row, duration=twin.duration), windows)


def take_events(
    events: Iterator, todo: dict[int, Track], files: VectorFiles, moments: bool
) -> Iterator[tuple[Track, str | None]]:
    """Write what encoders hand over; yields each track as it is settled, with why it was left out, or None.

    Events are told apart by what they carry: `vectors` of windows, a `reason`, or else the `mean`.
    """
    windows: dict[int, list[int]] = {}
    for event in events:
        track = todo[event.key]
        try:
            if hasattr(event, "vectors"):
                windows.setdefault(event.key, []).extend(files.write("windows", event.vectors))
                continue
            reason = getattr(event, "reason", None)
            if reason is None:
                (row,) = files.write("vectors", event.mean[None])
                starts = list(zip(event.starts, windows.get(event.key, []), strict=True)) if moments else []
                files.put(replace(track, row=row, duration=event.seconds), starts)
        except ValueError as error:
            reason = f"{printable(Path(track.path))}: {error}"
        windows.pop(event.key, None)
        yield track, reason


def prune(files: VectorFiles, changes: Changes) -> int:
    """Take out the tracks that stood below the folders walked and are no longer there; returns how many.

    What is below a folder that could not be read is kept: nobody knows whether it is there.
    """
    gone = [
        track.id
        for track in files.tracks()
        if track.id not in changes.present
        and any(Path(track.path).is_relative_to(root) for root in changes.roots)
        and not any(Path(track.path).is_relative_to(each) for each in changes.unread)
    ]
    files.remove(gone)
    return len(gone)


@dataclass(frozen=True)
class Synced:
    """What `sync` did to the collections: rows put in, rows taken out.

    kinds: each collection's index type, and what it was before where `auto` has outgrown that, else None.
    """

    put: int
    removed: int
    kinds: dict[str, tuple[str, str | None]]


def check_collections(database: VectorDatabase, space: IndexSpace, checkpoint: str, reindex: bool) -> None:
    """Raise `UserError` where a collection is of something else, unless it is about to be made anew."""
    for name in (space.name, moments_collection(space.name)):
        found = database.identity(name)
        if found is None and database.has(name):
            raise UserError(
                f"{database.uri}: the collection {name!r} was not made by this toolkit; bring its plain vectors over "
                f"with --from-collection {name} into another --milvus-uri"
            )
        if found is not None and not reindex:
            check_identity(found, {**space.identity, "space": space.name}, database.uri, checkpoint)


def sync(
    files: VectorFiles,
    database: VectorDatabase,
    space: IndexSpace,
    index: IndexChoice,
    moments: bool,
    reindex: bool,
    step: Callable[[int], object],
) -> Synced:
    """Make the collections hold what the catalogue names, no more and no less, and wait for their index.

    Rows are compared by id and version, so that it goes on wherever an earlier run was stopped. `step` is called with
    the number of rows put in, as they are. An index type of "auto" is settled for each collection by its size.
    """
    put, removed, kinds = 0, 0, {}
    if reindex and not moments:
        database.drop(moments_collection(space.name))
    names = [space.name, moments_collection(space.name)] if moments else [space.name]
    for name in names:
        chosen, outgrown, versions = _collection(files, database, space, index, name, reindex)
        kinds[name] = chosen.kind, outgrown
        is_tracks = name == space.name
        rows = _changed(_track_rows(files) if is_tracks else _window_rows(files), versions)
        put += _put(database, name, space, files.vectors if is_tracks else files.windows, rows, step)
        database.delete(name, versions)  # `_changed` leaves those that nothing names any more
        removed += len(versions)
        database.build(name, chosen)  # also where nothing changed: an earlier run may have been killed before it
    return Synced(put, removed, kinds)


def _collection(
    files: VectorFiles, database: VectorDatabase, space: IndexSpace, index: IndexChoice, name: str, reindex: bool
) -> tuple[IndexChoice, str | None, dict[int, int]]:
    """A collection to put rows into: its index type, the one that auto has outgrown, the versions of what is in it."""
    there, is_tracks = database.identity(name), name == space.name
    before = there.get("index_type") if there and not reindex else None
    was_auto = there is not None and there.get("index_choice") == AUTO
    rows = len(files) if is_tracks else files.count_windows()
    chosen = index.resolved(rows, space.dim, before if was_auto else None)
    noted = {"index_type": chosen.kind, "index_choice": index.kind}
    if not is_local(database.uri):
        noted["vectors"] = str(files.folder.parent)
    if there is not None and before == chosen.kind:
        if there != (known := {**there, **noted}):
            database.note(name, known)
        return chosen, None, database.versions(name)
    database.drop(name)
    database.create(name, space.dim, chosen, {**space.identity, **noted}, moments=not is_tracks)
    return chosen, before if was_auto and index.kind == AUTO else None, {}


def _changed(rows: Iterable[dict], versions: dict[int, int]) -> Iterator[dict]:
    """The rows that are not there in their version; every row that is seen leaves `versions`."""
    for row in rows:
        if versions.pop(row["id"], None) != row["version"]:
            yield row


def _put(
    database: VectorDatabase,
    name: str,
    space: IndexSpace,
    source: np.ndarray,
    rows: Iterator[dict],
    step: Callable[[int], object],
) -> int:
    size, put = max(1, min(1000, _ROWS_AT_ONCE_ELEMENTS // space.audio_dim)), 0
    while batch := list(islice(rows, size)):
        vectors = space.audio(source[[row.pop("row") for row in batch]])
        database.upsert(name, [{**row, FIELD: vector} for row, vector in zip(batch, vectors, strict=True)])
        put += len(batch)
        step(len(batch))
    return put


def _track_rows(files: VectorFiles) -> Iterator[dict]:
    """What the collection of tracks is to hold, but for the vectors, which `row` stands for."""
    fields = ("id", "version", "row", "path", "title", "artist", "album", "duration")
    return ({name: getattr(track, name) for name in fields} for track in files.tracks())


def _window_rows(files: VectorFiles) -> Iterator[dict]:
    """The same for the collection of windows. A window's id is its row."""
    return ({"id": each.row, **vars(each)} for each in files.windows_of())


def bring_over(
    source: VectorDatabase, collection: str, files: VectorFiles, standardised: bool, step: Callable[[], object]
) -> int:
    """Take over a Milvus collection of plain vectors: its field `embedding`, `path`, and tags where it has them.

    standardised: whether the checkpoint standardises vectors, which unit vectors have lost the scale for. Returns the
    tracks taken over. Raises `UserError` for a collection that does not fit.
    """
    if not source.has(collection):
        raise UserError(f"{source.uri}: no collection {collection!r}; there are: {', '.join(source.names()) or 'none'}")
    if source.identity(collection) is not None:
        raise UserError(f"{source.uri}: {collection}: an index of this toolkit, which holds standardised vectors, "
                        f"not plain ones; use --reindex")  # fmt: skip
    taken = 0
    for row in source.rows(collection, ["*"], batch_size=100):
        if "path" not in row or FIELD not in row:
            raise UserError(
                f"{source.uri}: {collection}: expected the fields 'path' and {FIELD!r}, found {sorted(row)}"
            )
        vector = np.asarray(row[FIELD], np.float32)
        if vector.shape != (files.dim,):
            raise UserError(
                f"{source.uri}: {collection}: expected vectors {files.dim} wide, as the checkpoint has them, "
                f"found {len(vector)}"
            )
        if standardised and abs(np.linalg.norm(vector) - 1) < 1e-3:
            raise UserError(
                f"{source.uri}: {collection}: holds unit vectors, which a checkpoint that standardises cannot use; "
                f"expected plain vectors, or a checkpoint of `train.py --standardise none`"
            )
        _put_foreign(files, row, vector)
        taken += 1
        step()
    return taken


def _put_foreign(files: VectorFiles, row: dict, vector: np.ndarray) -> None:
    path = Path(row["path"]).resolve()
    size, mtime, digest = -1, -1, b""
    if path.is_file():  # then the next walk over the folder leaves it as it is
        state = path.stat()
        size, mtime, digest = state.st_size, state.st_mtime_ns, content_hash(path)
    try:
        (number,) = files.write("vectors", vector[None])
    except ValueError as error:
        raise UserError(f"{row['path']}: {error}") from error
    title, artist, album = (str(row.get(name) or "") for name in ("title", "artist", "album"))
    duration = float(row.get("duration") or 0)
    track = Track(track_id(path), str(path), size, mtime, digest, title or path.stem, artist, album, duration, number)
    files.put(track, [])
