"""Writing embeddings.h5: its fixed structure first, rows in place, statistics, and the rename at the end."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np

from common.errors import UserError
from common.files import replacing, require_space
from store.checksum import BLOCK_BYTES, write_checksum
from store.reading import (
    DIGEST_BYTES,
    FORMAT,
    SPLITS,
    STATES,
    VERSION,
    Block,
    Split,
    StoreHeader,
    blocks_of,
    digest_block,
    statistics_block,
    vector_block,
)

_CHUNK_ROWS = 128  # rows per step: 80 MB of float64 at 76,800 dimensions
_ALIGNMENT = 64  # bytes; a mapped array that starts off its element size is read element by element
_STRING = h5py.string_dtype("utf-8")


def create_store(
    path: str | Path,
    header: StoreHeader,
    splits: dict[str, Split],
    skipped: Iterable[tuple[str, str]] = (),
    settings: dict | None = None,
) -> dict[str, Block]:
    """Write everything but the vectors and statistics, reserve their space, and return where they lie.

    After this the HDF5 structure never changes: rows are written in place, so that a process killed at any
    instant leaves a readable file. HDF5's own metadata has checksums too (file format of HDF5 1.10).

    settings: what a work file keeps of its run; it then has a state per row, 0 at first.
    Raises `UserError` where the disk is too full.
    """
    path = Path(path)
    require_space(path.parent, store_bytes(header, splits), path.name)
    layout = {"alignment_threshold": 1, "alignment_interval": _ALIGNMENT, "userblock_size": BLOCK_BYTES}
    with h5py.File(path, "w", libver=("v110", "v110"), **layout) as file:
        _write_attributes(file, header)
        if settings is not None:
            file.attrs["settings"] = json.dumps(settings)
            rows = sum(len(split.audio_id) for split in splits.values())
            file.create_dataset(STATES, data=np.zeros(rows, np.uint8))
        for name in SPLITS:
            _create_split(file, name, splits[name], header)
        for encoder, entry in header.encoders.items():
            for which in ("mean", "std"):
                _reserve(file, statistics_block(encoder, which), (entry["dim"],), np.dtype("<f4"))
        pairs = list(skipped)
        _write_strings(file, "skipped/audio_id", [audio_id for audio_id, _ in pairs])
        _write_strings(file, "skipped/reason", [reason for _, reason in pairs])
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            raise UserError(f"{path}: could not reserve its space on disk: {error.strerror}") from error
        os.fsync(file.fileno())
    with h5py.File(path, "r") as stored:
        blocks = blocks_of(path, stored)
    write_checksum(path, [(block.offset, block.row_bytes * block.shape[0]) for block in blocks.values()])
    return blocks


def _write_attributes(file: h5py.File, header: StoreHeader) -> None:
    attributes = {
        **asdict(header),
        "revision": header.revision or "",
        "encoders": json.dumps(header.encoders),
    }
    weights = attributes.pop("weights")
    if weights:
        attributes["weights"] = json.dumps(weights)
    for name, value in {"format": FORMAT, "version": VERSION, **attributes}.items():
        file.attrs[name] = value


def _create_split(file: h5py.File, name: str, split: Split, header: StoreHeader) -> None:
    for column in ("audio_id", "source_id", "caption", "caption_kind"):
        _write_strings(file, f"{name}/{column}", getattr(split, column))
    file.create_dataset(f"{name}/caption_audio", data=np.asarray(split.caption_audio, np.int64))
    _reserve(file, digest_block(name), (len(split.audio_id), DIGEST_BYTES), np.dtype(np.uint8))
    for encoder, entry in header.encoders.items():
        _reserve(file, vector_block(name, encoder), (len(split.audio_id), entry["dim"]), header.numpy_dtype)


def _write_strings(file: h5py.File, name: str, values: list[str]) -> None:
    file.create_dataset(name, shape=(len(values),), dtype=_STRING, data=np.array(values, dtype=object))


def _reserve(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    # Allocated at once and never filled: the offset is fixed now, and gigabytes of zeros are not written.
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    space = h5py.h5s.create_simple(shape)
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(dtype), space, plan, links).close()


def store_bytes(header: StoreHeader, splits: dict[str, Split]) -> int:
    """Estimate the finished file's size in bytes: vectors and statistics exactly, strings from above."""
    rows = sum(len(split.audio_id) for split in splits.values())
    strings = sum(
        len(text.encode()) + 48  # HDF5 keeps a 16-byte reference and a padded 16-byte heap header for each
        for split in splits.values()
        for column in (split.audio_id, split.source_id, split.caption, split.caption_kind)
        for text in column
    )
    captions = sum(len(split.caption) for split in splits.values())
    statistics = sum(2 * 4 * entry["dim"] for entry in header.encoders.values())
    return rows * (header.row_bytes + DIGEST_BYTES + 1) + statistics + strings + 8 * captions + 128 * 1024


def row_chunks(vectors: np.ndarray, rows: int = _CHUNK_ROWS) -> Iterator[np.ndarray]:
    """Yield the rows a few at a time, so that a mapped array is never in memory whole."""
    for start in range(0, len(vectors), rows):
        yield vectors[start : start + rows]


def column_statistics(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population standard deviation per column of (N, D), in float64 and one pass.

    Chunks are joined by the parallel update of Chan, Golub and LeVeque (1983), which does not cancel
    where the mean is large beside the deviation. Raises `UserError` for no rows.
    """
    count, mean, squares = 0, np.zeros(()), np.zeros(())  # of no shape yet: the first chunk gives them its own
    for chunk in row_chunks(vectors):
        chunk = chunk.astype(np.float64)
        chunk_mean = chunk.mean(0)
        total = count + len(chunk)
        delta = chunk_mean - mean
        squares = squares + ((chunk - chunk_mean) ** 2).sum(0) + delta**2 * (count * len(chunk) / total)
        mean = mean + delta * (len(chunk) / total)
        count = total
    if count == 0:
        raise UserError("no train recording is left, so the spaces have no mean and standard deviation")
    return mean, np.sqrt(squares / count)


def write_statistics(path: str | Path, blocks: dict[str, Block], encoders: Iterable[str]) -> None:
    """Compute every space's statistics from the train rows in `path` and write them in place."""
    for encoder in encoders:
        values = column_statistics(blocks[vector_block("train", encoder)].map(path))
        for which, value in zip(("mean", "std"), values, strict=True):
            target = blocks[statistics_block(encoder, which)].map(path, "r+")
            target[:] = value
            if isinstance(target, np.memmap):
                target.flush()


def write_store(
    path: str | Path,
    header: StoreHeader,
    splits: dict[str, Split],
    vectors: dict[tuple[str, str], np.ndarray],
    skipped: Iterable[tuple[str, str]] = (),
    digests: dict[str, np.ndarray] | None = None,
) -> None:
    """Write a complete store in one go, beside `path` and renamed when it is whole.

    `vectors` maps (split, encoder) to (N, D), `digests` split to (N, 16) uint8 where they are known. Kept to what fits
    in memory or is mapped; rows are copied a few at a time.
    """
    with replacing(path) as beside:
        blocks = create_store(beside, header, splits, skipped)
        columns = {vector_block(split, encoder): rows for (split, encoder), rows in vectors.items()}
        columns |= {digest_block(split): rows for split, rows in (digests or {}).items()}
        for block, rows in columns.items():
            target = blocks[block].map(beside, "r+")
            start = 0
            for chunk in row_chunks(rows):
                target[start : start + len(chunk)] = chunk
                start += len(chunk)
            if isinstance(target, np.memmap):
                target.flush()
        write_statistics(beside, blocks, header.encoders)
