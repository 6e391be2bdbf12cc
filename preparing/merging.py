"""From settled shards to embeddings.h5: a rename where nothing was skipped, else a copy without the gaps."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from common.files import locked, publish, replacing, require_space
from preparing.work_file import DONE, REASONS, TODO, WorkFile, any_shards, check_settings, shard_path, tail_is_cut
from store.reading import SPLITS, EmbeddingStore, Split, digest_block, vector_block
from store.writing import create_store, store_bytes, write_statistics


def finish(
    folder: Path,
    num_splits: int,
    say: Callable[[str], None],
    is_made: Callable[[Path], bool] = Path.exists,
) -> Path | None:
    """Write embeddings.h5 from the shards in `folder`; None while another shard is still being worked on.

    The shards are removed once the store is in place. Safe to call from several processes: the last one to
    settle its rows does the work, under a lock. Raises `UserError` where the disk is too full for the copy.

    is_made: whether an embeddings.h5 that is there is the one the shards are for, and not the one before, which the
    finished one replaces.
    """
    target = folder / "embeddings.h5"
    with locked(folder / "embeddings.merge.lock"):
        if target.exists() and is_made(target):
            remove_shards(folder)  # a process killed between its rename and its clean-up leaves them
            return target
        paths = [shard_path(folder, split_id, num_splits) for split_id in range(num_splits)]
        if num_splits == 1 and tail_is_cut(paths[0]):
            publish(paths[0], target)
            return target
        missing = [path.name for path in paths if not path.exists()]
        if missing:
            say(f"not merged yet: {', '.join(missing)} not begun")
            return None
        shards = [WorkFile(path) for path in paths]
        try:
            return _finish_shards(shards, target, say)
        finally:
            for shard in shards:
                shard.close()


def _finish_shards(shards: list[WorkFile], target: Path, say: Callable[[str], None]) -> Path | None:
    for shard in shards:
        check_settings(shard.path, shard.settings, shards[0].settings)
    open_rows = {shard.path.name: int((shard.states == TODO).sum()) for shard in shards}
    if any(open_rows.values()):
        left = ", ".join(f"{name} ({rows:,} to do)" for name, rows in open_rows.items() if rows)
        say(f"not merged yet: {left}")
        return None
    if len(shards) == 1 and (shards[0].states == DONE).all():
        say("computing the statistics of the train recordings")
        write_statistics(shards[0].path, shards[0].blocks, shards[0].header.encoders)
        shards[0].finish_in_place(target)
        return target
    say(f"copying {len(shards)} shard(s) into {target.name}")
    _copy(shards, target)
    remove_shards(target.parent)
    return target


def remove_shards(folder: Path) -> None:
    """Remove every work file of `folder`, of whatever number of shards."""
    for path in any_shards(folder):
        path.unlink()


def _copy(shards: list[WorkFile], target: Path) -> None:
    header = shards[0].header
    splits, sources = {}, {}
    for name in SPLITS:
        done = [shard.state(name) == DONE for shard in shards]
        splits[name], sources[name] = _interleave([shard.splits[name] for shard in shards], done)
    require_space(target.parent, store_bytes(header, splits), f"copying the finished rows to {target.name}")
    with replacing(target) as beside:
        blocks = create_store(beside, header, splits, _skipped(shards))
        for name in SPLITS:
            columns = [digest_block(name), *(vector_block(name, encoder) for encoder in header.encoders)]
            for block in columns:
                if not all(block in shard.blocks for shard in shards):
                    continue  # digests, of which a shard of an older version has none
                maps = [shard.blocks[block].map(shard.path) for shard in shards]
                _copy_rows(maps, sources[name], blocks[block].map(beside, "r+"))
        write_statistics(beside, blocks, header.encoders)


def _interleave(parts: list[Split], done: list[np.ndarray]) -> tuple[Split, list[tuple[int, int]]]:
    """Join one split's shards in the order of a single run: its row g is row g // N of shard g % N.

    Returns the split of the rows that are done, and the (shard, row) of each.
    """
    joined, first = Split(), []
    for part in parts:
        first.append(len(joined.audio_id))
        joined = Split(
            joined.audio_id + part.audio_id,
            joined.source_id + part.source_id,
            joined.caption + part.caption,
            np.concatenate([joined.caption_audio, part.caption_audio + first[-1]]),
            joined.caption_kind + part.caption_kind,
        )
    order = [divmod(row, len(parts))[::-1] for row in range(len(joined.audio_id))]
    kept = [(shard, row) for shard, row in order if done[shard][row]]
    return joined.take(np.array([first[shard] + row for shard, row in kept], np.int64)), kept


def _copy_rows(shards: list[np.ndarray], rows: list[tuple[int, int]], target: np.ndarray) -> None:
    for row, (shard, source_row) in enumerate(rows):
        target[row] = shards[shard][source_row]
    if isinstance(target, np.memmap):
        target.flush()


def _skipped(shards: list[WorkFile]) -> list[tuple[str, str]]:
    pairs = []
    for shard in shards:
        pairs += EmbeddingStore(shard.path).skipped()  # known before any audio was read
        for name in SPLITS:
            states = shard.state(name)
            pairs += [
                (shard.splits[name].audio_id[row], REASONS[int(states[row])])
                for row in np.flatnonzero((states != DONE) & (states != TODO))
            ]
    return sorted(pairs)
