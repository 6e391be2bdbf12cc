"""What gradient caching needs: dropout that a second pass draws again, and all micro-batches' embeddings."""

import numpy as np
import torch
from torch import Tensor

from text_to_audio.processes import Processes


def seed_dropout(seed: int, step: int, part: int) -> None:
    """Set torch's generators for one micro-batch of one step.

    Dropout then depends on nothing else: a second pass draws the same masks, and so does a resumed run.
    """
    torch.manual_seed(int(np.random.SeedSequence((seed, step, part)).generate_state(1, np.uint64)[0] >> 1))


def gather(own: dict[int, Tensor], sizes: list[int], processes: Processes, blank: Tensor) -> Tensor:
    """Embeddings of all micro-batches one after the other, (sum of sizes, dim), from each process's own.

    own: micro-batch -> embeddings. blank: (0, dim).
    """
    embeddings = blank.new_zeros(sum(sizes), blank.shape[1])
    slots = embeddings.split(sizes)
    for number, known in own.items():
        slots[number].copy_(known)
    processes.sum([embeddings])
    return embeddings
