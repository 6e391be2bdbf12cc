"""What a run of index_library.py will take: tracks and their hours, time on this device, disk and memory.

Nothing is written. Lengths are what headers say, the time is that of a few of the tracks.
"""

import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from common.errors import UserError
from common.plan_lines import busy_note, free_bytes, gigabytes, named
from embedding_models.audio import AudioError
from embedding_models.lengths import Lengths, SizedFile, estimate_lengths, evenly
from embedding_models.pace import USUAL_FORMATS, Device, by_arithmetic, decoding_seconds, time_tracks, together
from embedding_models.registry import EncoderSpec
from music_library.milvus_index import SERVER_MAX_DIM, IndexChoice
from music_library.music_folder import MusicFolder, content_hash, read_tags, track_id
from music_library.vector_files import DTYPE, VectorFiles

TRIED = 20  # tracks that are timed at most
# Milvus Lite, 100,000 x 1536 on 2 CPU cores (docs/measurements.md, "Search"): seconds until an index was confirmed, and
# bytes of memory at the peak
MEASURED_ELEMENTS, MEASURED_MEMORY = 100_000 * 1536, 5.1e9
MEASURED_SECONDS = {"HNSW": 302, "IVF_FLAT": 119, "FLAT": 132}
_LINKS = 256  # bytes of a row in HNSW's graph: 2 x M = 64 links of four


@dataclass(frozen=True)
class PlannedSpace:
    """The space that a folder is indexed for. dim: of a plain vector; hidden_dim: of the checkpoint's head, which a
    narrow index has; origin: where that is from, in words."""

    name: str
    spec: EncoderSpec
    dim: int
    hidden_dim: int
    origin: str


@dataclass(frozen=True)
class PlannedIndex:
    """Settings of a run that the plan follows. folder: of the plain vectors; uri: of the index."""

    space: PlannedSpace
    music: Path
    folder: Path
    uri: str
    kind: str
    narrow: bool
    moments: bool
    batch_size: int
    processes: int

    @property
    def index_dim(self) -> int:
        """Width of an indexed vector."""
        narrow = self.narrow or self.space.dim > SERVER_MAX_DIM
        return self.space.hidden_dim + 2 if narrow else self.space.dim

    def kind_of(self, rows: int) -> str:
        """The index type of a collection of so many rows."""
        return IndexChoice(self.kind).resolved(rows, self.index_dim).kind


@dataclass
class FoundTracks:
    """What a walk over a folder found: files that can be read, those of them that are to be embedded, the others."""

    all: list[SizedFile] = field(default_factory=list)
    todo: list[SizedFile] = field(default_factory=list)
    left_out: int = 0
    moments: bool = False  # whether windows are kept, now or from before


def plan_lines(index: PlannedIndex) -> Iterator[str]:
    """The plan, line by line. `UserError` for a folder without music, or none that can be decoded."""
    space = index.space
    yield from named("space", f"{space.name}: {space.spec.name}, {space.dim:,} dimensions ({space.origin})")
    found = look_at(index)
    if not found.all:
        raise UserError(f"{index.music}: expected audio files, found none")
    index = replace(index, moments=found.moments)
    lengths, todo = estimate_lengths(found.all), estimate_lengths(found.todo)
    known = len(found.all) - len(found.todo)
    yield from named("tracks", f"{len(found.all):,} files, {gigabytes(sum(size for _, size in found.all))} in "
                               f"{index.music}; {known:,} of them are indexed and unchanged; {found.left_out:,} others "
                               f"are left out")  # fmt: skip
    yield from named("sound", sound(lengths))
    if found.todo:
        yield from time_lines(index, found.todo, todo)
    rows = [len(found.all), lengths.windows] if index.moments else [len(found.all)]
    yield from disk_lines(index, rows)
    yield from memory_lines(index, sum(rows))


def look_at(index: PlannedIndex) -> FoundTracks:
    """Walk over the folder, as indexing does; a track of the size and time that are noted is known already."""
    found, catalogue = FoundTracks(), index.folder / index.space.name / "catalogue.sqlite"
    files = VectorFiles(index.folder, index.space.name) if catalogue.is_file() else None
    found.moments = index.moments or (files is not None and files.holds_windows)
    for path, reason in MusicFolder(index.music):
        try:
            state = path.stat() if reason is None else None
        except OSError:
            state = None
        if state is None:
            found.left_out += 1
            continue
        found.all.append((path, state.st_size))
        known = files.find(id=track_id(path)) if files is not None else None
        if files is not None and known and found.moments and not files.has_windows(known.id):
            known = None
        if known is None or (known.size, known.mtime_ns) != (state.st_size, state.st_mtime_ns):
            found.todo.append((path, state.st_size))
    if files is not None:
        files.close()
    return found


def sound(lengths: Lengths) -> str:
    """How much there is to hear, and how that is known."""
    untold = f"; {lengths.unknown:,} do not tell and are not counted in" if lengths.unknown else ""
    return (
        f"about {_hours(lengths.seconds / 3600)}, {lengths.windows:,} windows of 10 s: an estimate by the headers of "
        f"{lengths.looked_at:,} files{untold}"
    )


def time_lines(index: PlannedIndex, files: list[SizedFile], lengths: Lengths) -> Iterator[str]:
    """The hours that embedding takes on the device, and the index after it."""
    picked = [path for path, _ in evenly(files, TRIED)]
    seconds, device, origin = window_seconds(index, picked)
    embedding = seconds * lengths.windows + _looking_seconds(picked) * len(files)
    rows = [len(files), lengths.windows] if index.moments else [len(files)]
    building = sum(MEASURED_SECONDS[index.kind_of(each)] * each for each in rows) * index.index_dim / MEASURED_ELEMENTS
    yield from named("time", f"about {_hours((embedding + building) / 3600)} on {device}, beside starting and loading")
    yield from named("", f"embedding {_spell(embedding)}: {seconds:.3g} s a window, {origin}{busy_note()}")
    kinds = {index.kind_of(each) for each in rows}
    measured = " and ".join(f"{MEASURED_SECONDS[kind]} s for {kind}" for kind in sorted(kinds))
    yield from named("", f"Milvus {_spell(building)}, going by {measured} of 100,000 x 1,536 on 2 CPU cores")


def window_seconds(index: PlannedIndex, paths: list[Path]) -> tuple[float, torch.device, str]:
    """Seconds that a window takes from file to vector, on which device, and where that is from."""
    spec, device = index.space.spec, Device(index.space.spec.device)
    if not spec.is_here:
        pace = by_arithmetic(spec, device)
        decoding = decoding_seconds(paths, USUAL_FORMATS[:1])
        seconds = together(pace.seconds, decoding, device.torch, index.processes)
        return seconds / _devices(index, device.torch), device.torch, pace.origin
    encoder = spec.load()
    try:
        timed = time_tracks(encoder, paths, index.batch_size)
    except AudioError as error:
        raise UserError(
            f"{index.music}: none of the {len(paths)} tracks that were tried can be read, such as: {error}"
        ) from error
    origin = f"timed just now on {timed.tracks} of the tracks"
    return timed.seconds / _devices(index, device.torch), device.torch, origin


def _devices(index: PlannedIndex, device: torch.device) -> int:
    """Among how many devices the tracks are dealt out; processes on one device, or on a CPU, are no gain here."""
    return min(index.processes, torch.cuda.device_count()) if device.type == "cuda" and device.index is None else 1


def _looking_seconds(paths: list[Path]) -> float:
    """Seconds for a track's content hash and tags, on average over a few."""
    started, looked_at = time.perf_counter(), 0
    for path in paths:
        content_hash(path)
        read_tags(path)
        looked_at += 1
        if time.perf_counter() - started > 1:
            break
    return (time.perf_counter() - started) / max(1, looked_at)


def disk_lines(index: PlannedIndex, rows: list[int]) -> Iterator[str]:
    """Plain vectors and the index. rows: of tracks, and of windows where moments are indexed."""
    plain = sum(rows) * index.space.dim * DTYPE.itemsize
    narrow = index.index_dim != index.space.dim
    basis = index.space.dim * (index.space.hidden_dim + 1) * 4 if narrow else 0
    indexed = sum(each * index_bytes(index.index_dim, index.kind_of(each)) for each in rows)
    kinds = " and ".join(dict.fromkeys(index.kind_of(each) for each in rows))
    extra = f" + {gigabytes(basis)} for the narrow form's basis" if basis else ""
    free = gigabytes(free_bytes(index.folder))
    yield from named("disk", f"plain vectors {gigabytes(plain)}{extra} in {index.folder}, where {free} are free")
    yield from named("", f"index {gigabytes(indexed)} in {index.uri} ({kinds}, {index.index_dim:,} dimensions)")


def index_bytes(dim: int, kind: str) -> int:
    """Bytes of a row: its float32 vector among the data and in the index, and HNSW's links.

    By that 100,000 x 1536 take 1.25 GB, which is what was measured.
    """
    return 2 * 4 * dim + (_LINKS if kind == "HNSW" else 0)


def memory_lines(index: PlannedIndex, rows: int) -> Iterator[str]:
    """What the processes hold: of embedding as far as it was tried, of the index by measurement."""
    building = MEASURED_MEMORY * rows * index.index_dim / MEASURED_ELEMENTS
    spec = index.space.spec
    if spec.is_here:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        held = f"{gigabytes(resident)} in each of {index.processes} processes"
        device = Device(spec.device).torch
        if device.type == "cuda":
            held += f", {gigabytes(torch.cuda.max_memory_reserved(device))} on the device"
        yield from named("memory", f"embedding {held}, as just now; it does not grow with a track's length")
    else:
        yield from named("memory", "embedding: not known until the encoder's weights are here")
    yield from named("", f"Milvus {gigabytes(building)} while the index is made, going by 5.1 GB for 100,000 x 1,536")


def _hours(hours: float) -> str:
    return f"{hours:,.2f} h" if hours < 10 else f"{hours:,.0f} h"


def _spell(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds < 600 else _hours(seconds / 3600)
