"""Which rows a process computes: begin a shard, go on with one, or find that its store is already there."""

import hashlib
import json
from pathlib import Path

import numpy as np

from common.errors import UserError
from preparing.recordings import Dataset
from preparing.work_file import WorkFile, any_shards, check_settings, shard_path, tail_is_cut
from store.reading import SPLITS, STATES, Split, StoreHeader, read_blocks, read_settings


def split_columns(dataset: Dataset, split_id: int, num_splits: int) -> dict[str, Split]:
    """Return the strings of one shard: of each split the rows split_id, split_id + num_splits, ..."""
    splits = {}
    for name in SPLITS:
        recordings = [recording for recording in dataset.recordings if recording.split == name]
        recordings = recordings[split_id::num_splits]
        captions = [(row, caption) for row, item in enumerate(recordings) for caption in item.captions]
        splits[name] = Split(
            [recording.audio_id for recording in recordings],
            [recording.source_id for recording in recordings],
            [caption.text for _, caption in captions],
            np.array([row for row, _ in captions], np.int64),
            [caption.kind for _, caption in captions],
        )
    return splits


def open_shard(folder: Path, header: StoreHeader, dataset: Dataset, split_id: int, num_splits: int) -> WorkFile | None:
    """Go on with a shard's work file, or make it; None where it is finished and only its rename is left.

    Raises `UserError` where a shard in `folder` was begun with other settings or another number of shards.
    """
    path = shard_path(folder, split_id, num_splits)
    others = [other.name for other in any_shards(folder) if not other.match(f"*-of-{num_splits}.h5")]
    keeps_store = (folder / "embeddings.h5").exists()  # --overwrite would remove it too
    if others:
        remedy = "remove those shards" if keeps_store else "--overwrite"
        found = f"expected --num-splits as in {others[0]}, found {num_splits}"
        raise UserError(f"{folder}: {found}; go on with that number, or {remedy}")
    settings = run_settings(header, dataset)
    if path.exists():
        if num_splits == 1 and tail_is_cut(path):
            return None
        work = WorkFile(path)
        check_settings(path, work.settings, settings, "remove the file" if keeps_store else "--overwrite")
        return work
    no_caption = dataset.dropped.get("no caption", []) if split_id == 0 else []
    skipped = [(audio_id, "no caption") for audio_id in no_caption]
    return WorkFile.create(path, header, split_columns(dataset, split_id, num_splits), settings, skipped)


def run_settings(header: StoreHeader, dataset: Dataset) -> dict:
    """What the runs that work on one store must agree in."""
    return {
        "encoders": header.encoders,
        "weights": header.weights,
        "dtype": header.dtype,
        "seed": header.seed,
        "recordings": _digest(dataset),
    }


def remove_leftovers(folder: Path, header: StoreHeader, dataset: Dataset) -> None:
    """Remove shards of a store that is finished: a process killed between its rename and its clean-up leaves them."""
    for path in any_shards(folder):
        if STATES in read_blocks(path) and read_settings(path) == run_settings(header, dataset):
            path.unlink()


def _digest(dataset: Dataset) -> str:
    """A short digest of the recordings, their split and their captions, to tell a changed data set."""
    listing = [(item.audio_id, item.source_id, item.split, *item.captions) for item in dataset.recordings]
    text = json.dumps(listing, default=lambda caption: [caption.kind, caption.text])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def discard(folder: Path, split_id: int, num_splits: int) -> None:
    """Remove the store, this shard, and shards of another number of shards; other processes' shards stay."""
    (folder / "embeddings.h5").unlink(missing_ok=True)
    own = shard_path(folder, split_id, num_splits)
    for path in any_shards(folder):
        if path == own or not path.match(f"*-of-{num_splits}.h5"):
            path.unlink()
