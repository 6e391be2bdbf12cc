"""Gradients of an effective batch from micro-batches: one after the other, or of one loss over all their features."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from text_to_audio.processes import Processes

Embed = Callable[[int], Tensor]
Losses = Callable[[Tensor, list[int]], Tensor]


def seed_dropout(seed: int, step: int, part: int) -> None:
    """Set torch's generators for one micro-batch of one step.

    Dropout then depends on nothing else: a second pass draws the same masks, and so does a resumed run.
    """
    torch.manual_seed(int(np.random.SeedSequence((seed, step, part)).generate_state(1, np.uint64)[0] >> 1))


def backward_by_part(
    embed: Embed, losses_of: Losses, parts: list[np.ndarray], processes: Processes, blank: Tensor
) -> Tensor:
    """Backward through each micro-batch's own loss; returns the mean losses over the batch's captions, detached.

    embed(number): sentence embeddings (texts, dim) of that micro-batch, with their graph. losses_of(embeddings,
    numbers): one or more mean losses over the texts of these micro-batches, of which the sum is descended. A
    micro-batch weighs as much as it has captions. blank: (0, dim), embeddings of nothing, for a process without a
    micro-batch. Gradients and losses are this process's share: sum them.
    """
    count = sum(map(len, parts))
    total = blank.new_zeros(())
    for number in processes.own(range(len(parts))):
        losses = losses_of(embed(number), [number]) * (len(parts[number]) / count)
        losses.sum().backward()
        total = total + losses.detach()
    return total


def backward_through_cache(
    embed: Embed, losses_of: Losses, parts: list[np.ndarray], processes: Processes, blank: Tensor
) -> Tensor:
    """Backward through one loss over all micro-batches, in the memory of one: gradient caching (Gao et al. 2021).

    The first pass keeps embeddings alone, the loss gives their gradients, and the second pass takes those through each
    micro-batch. `embed` must return the same embeddings both times, so it sets its random state itself. Arguments and
    result as in `backward_by_part`. Each process embeds its own micro-batches and computes the whole loss, which is
    small beside a pass of the text encoder, so that nothing is sent but embeddings.
    """
    own, sizes = processes.own(range(len(parts))), [len(part) for part in parts]
    with torch.no_grad():
        embeddings = gather({number: embed(number) for number in own}, sizes, processes, blank)
    embeddings.requires_grad_()
    losses = losses_of(embeddings, list(range(len(parts)))) / processes.count  # all add the same to the sum
    losses.sum().backward()
    gradients = (processes.count * embeddings.grad).split(sizes)
    for number in own:
        embed(number).backward(gradients[number])
    return losses.detach()


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
