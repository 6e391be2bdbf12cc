"""Checks of a finished embeddings.h5: structure, strings, captions, leaks, values and statistics."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from store.reading import SPLITS, EmbeddingStore, Split
from store.writing import column_statistics, row_chunks

_TOLERANCE = 1e-3  # of the largest value: the statistics are float32 of sums made in another order


def faults(path: str | Path) -> Iterator[str]:
    """Yield one line for each thing that is wrong with a store; nothing for a good one.

    Every vector is read once. Raises `UserError` where the file cannot be opened as a store at all.
    """
    store = EmbeddingStore(path)
    splits = {name: store.split(name) for name in SPLITS}
    for name, split in splits.items():
        yield from _string_faults(name, split)
        for encoder in store.encoders:
            yield from _vector_faults(store, name, encoder, len(split.audio_id))
    yield from _leaks(splits)
    for encoder in store.encoders:
        yield from _statistics_faults(store, encoder)


def _string_faults(name: str, split: Split) -> Iterator[str]:
    rows = len(split.audio_id)
    if len(split.source_id) != rows:
        yield f"/{name}: {rows} audio ids, but {len(split.source_id)} source ids"
    if len(set(split.audio_id)) != rows:
        yield f"/{name}: {rows - len(set(split.audio_id))} audio ids occur twice"
    if not len(split.caption) == len(split.caption_audio) == len(split.caption_kind):
        yield f"/{name}: caption, caption_audio and caption_kind differ in length"
    if len(split.caption_audio) and not 0 <= split.caption_audio.min() <= split.caption_audio.max() < rows:
        yield f"/{name}/caption_audio: expected rows 0 to {rows - 1}, found others"
    elif len(np.unique(split.caption_audio)) != rows:
        yield f"/{name}: {rows - len(np.unique(split.caption_audio))} recordings have no caption"
    if empty := sum(not caption.strip() for caption in split.caption):
        yield f"/{name}/caption: {empty} captions are empty"


def _vector_faults(store: EmbeddingStore, name: str, encoder: str, rows: int) -> Iterator[str]:
    vectors = store.vectors(name, encoder)
    if vectors.shape != (rows, store.dim(encoder)):
        yield f"/{name}/{encoder}_embeddings: expected {(rows, store.dim(encoder))}, found {vectors.shape}"
        return
    not_finite = zero = 0
    for chunk in row_chunks(vectors):
        not_finite += int((~np.isfinite(chunk)).any(1).sum())
        zero += int((chunk == 0).all(1).sum())
    if not_finite:
        yield f"/{name}/{encoder}_embeddings: {not_finite} rows are not finite"
    if zero:
        yield f"/{name}/{encoder}_embeddings: {zero} rows are all zero"


def _leaks(splits: dict[str, Split]) -> Iterator[str]:
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        shared = set(splits[one].source_id) & set(splits[other].source_id)
        if shared:
            yield f"{len(shared)} sources are in {one} and in {other}, such as {min(shared)!r}"


def _statistics_faults(store: EmbeddingStore, encoder: str) -> Iterator[str]:
    expected = column_statistics(store.vectors("train", encoder))
    for which, value, truth in zip(("mean", "std"), store.statistics(encoder), expected, strict=True):
        if not np.abs(value - truth).max() <= _TOLERANCE * np.abs(truth).max():
            yield f"/statistics/{encoder}/{which}: differs from that of the train rows"
