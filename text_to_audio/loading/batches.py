"""Which captions meet in a batch, their cached tokens, and the audio vectors that go with them."""

from collections.abc import Iterator

import numpy as np


def batches_per_epoch(source: np.ndarray, batch_size: int) -> int:
    """Fewest batches of at most `batch_size` captions in which no source (C,) is met twice."""
    return max(int(np.bincount(source).max()), -(-len(source) // batch_size))


def plan_epoch(source: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Deal every caption into one batch such that no batch holds two captions of one source.

    source: (C,) a number per source. Returns arrays of caption indices, whose sizes differ by at most one. The
    same seed and epoch give the same batches.

    Captions, source by source, are dealt out in rounds that visit every batch once. A source that runs over the end
    of a round goes on in batches that its first part did not visit. There are at least as many batches as captions
    of any source, so there always are some.
    """
    rng = np.random.default_rng((seed, epoch))
    count = batches_per_epoch(source, batch_size)
    order = rng.permutation(len(source))
    shuffled_source = rng.permutation(int(source.max()) + 1)[source]
    order = order[np.argsort(shuffled_source[order], kind="stable")]  # sources and their captions in random order
    dealt = source[order]
    batch_of = np.empty(len(source), np.int64)
    for start in range(0, len(source), count):
        stop = min(start + count, len(source))
        carried = 0
        if start and dealt[start] == dealt[start - 1]:
            carried = int((dealt[start:stop] == dealt[start]).sum())
            visited = batch_of[start - count : start][dealt[start - count : start] == dealt[start]]
        else:
            visited = np.zeros(0, np.int64)
        free = rng.permutation(np.setdiff1d(np.arange(count), visited))
        rest = rng.permutation(np.concatenate([free[carried:], visited]))
        batch_of[start:stop] = np.concatenate([free[:carried], rest])[: stop - start]
    by_batch = order[np.argsort(batch_of, kind="stable")]
    return np.split(by_batch, np.cumsum(np.bincount(batch_of, minlength=count))[:-1])


def micro_batches(captions: np.ndarray, lengths: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Split an effective batch into equal parts of at most `size` captions of like length.

    Yields positions in `captions`. Equal, since a small rest would leave its texts few others to be told from.
    """
    order = np.argsort(lengths[captions], kind="stable")
    yield from np.array_split(order, -(-len(order) // size))


def padding_share(plan: list[np.ndarray], lengths: np.ndarray, size: int) -> float:
    """Share of padding among all tokens of an epoch's forward passes."""
    padded = sum(
        len(part) * int(lengths[captions[part]].max())
        for captions in plan
        for part in micro_batches(captions, lengths, size)
    )
    return 1 - int(lengths.sum()) / padded
