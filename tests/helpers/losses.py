"""A loss written out, to compare with."""

import torch
import torch.nn.functional as F
from torch import Tensor


def symmetric_loss(similarity: Tensor, own: Tensor, temperature: float | Tensor) -> Tensor:
    """CLIP's loss of texts (rows) against recordings (columns), of which `own` are the texts' and there may be more."""
    texts = torch.arange(len(own))
    text_to_audio = F.cross_entropy(similarity / temperature, own)
    return (text_to_audio + F.cross_entropy(similarity[:, own].T / temperature, texts)) / 2
