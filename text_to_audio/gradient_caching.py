"""Gradients of an effective batch from micro-batches: one after the other, or of one loss over all their features."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Embed = Callable[[int], Tensor]
Loss = Callable[[Tensor, list[np.ndarray]], Tensor]


def seed_dropout(seed: int, step: int, part: int) -> None:
    """Set torch's generators for one micro-batch of one step.

    Dropout then depends on nothing else: a second pass draws the same masks, and so does a resumed run.
    """
    torch.manual_seed(int(np.random.SeedSequence((seed, step, part)).generate_state(1, np.uint64)[0] >> 1))


def backward_by_part(embed: Embed, loss_of: Loss, parts: list[np.ndarray]) -> Tensor:
    """Backward through each micro-batch's own loss; returns the mean loss over the batch's captions, detached.

    embed(number): text features (texts, dim) of that micro-batch, with their graph. loss_of(features, parts): mean loss
    over the texts of these micro-batches. A micro-batch weighs as much as it has captions.
    """
    count = sum(map(len, parts))
    total = 0.0
    for number, part in enumerate(parts):
        loss = loss_of(embed(number), [part]) * (len(part) / count)
        loss.backward()
        total = total + loss.detach()
    return total


def backward_through_cache(embed: Embed, loss_of: Loss, parts: list[np.ndarray]) -> Tensor:
    """Backward through one loss over all micro-batches, in the memory of one: gradient caching (Gao et al. 2021).

    The first pass keeps features alone, the loss gives their gradients, and the second pass takes those through each
    micro-batch. `embed` must return the same features both times, so it sets its random state itself. Arguments and
    result as in `backward_by_part`.
    """
    with torch.no_grad():
        features = torch.cat([embed(number) for number in range(len(parts))])
    features.requires_grad_()
    loss = loss_of(features, parts)
    loss.backward()
    for number, gradient in enumerate(features.grad.split([len(part) for part in parts])):
        embed(number).backward(gradient)
    return loss.detach()
