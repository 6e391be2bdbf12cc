"""From hidden states to one vector a text: the ways there are, and which one a model asks for.

All take hidden states (batch, tokens, width) and the attention mask (batch, tokens), and give (batch, width). The mask
says where a text is, so that padding may stand on either side and be of any id.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from common.errors import UserError
from text_to_audio.config import Pooling

OWN_FILE = "1_Pooling/config.json"  # where sentence-transformers keeps how a model is meant to be pooled
_OWN_NAMES: dict[str, Pooling] = {"lasttoken": "last", "last": "last", "mean": "mean", "cls": "cls"}


def last_token_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """The hidden state of each text's last token; the pad id may be the end token's, as it is in Qwen3-Embedding."""
    position = torch.arange(mask.shape[1], device=mask.device)
    last = (position * mask).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean hidden state over each text's tokens."""
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


def cls_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """The hidden state of each text's first token, as BGE and its like are trained."""
    first = mask.argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), first]


POOLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "last": last_token_pool,
    "mean": mean_pool,
    "cls": cls_pool,
}


def family_pooling(kind: str) -> Pooling:
    """What a model type is pooled by where nothing else is said, and what "auto" in an older checkpoint means.

    Families made for masked language modelling look both ways; in the others only the last token has seen the text.
    """
    return "mean" if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES else "last"


def model_pooling(name: str, folder: Path, config: PretrainedConfig) -> Pooling:
    """What "auto" means for a model: its own file, then whether it looks both ways, then its family.

    Raises `UserError` where its own file asks for a way that is not here.
    """
    if (folder / OWN_FILE).is_file():
        return _own_pooling(name, folder / OWN_FILE)
    if config.is_encoder_decoder:
        return "mean"  # what is loaded of it is the encoder, which looks both ways
    if getattr(config, "use_bidirectional_attention", False) or getattr(config, "is_causal", True) is False:
        return "mean"
    return family_pooling(config.model_type)


def _own_pooling(name: str, path: Path) -> Pooling:
    try:
        values = json.loads(path.read_text())
        mode = values.get("pooling_mode")
        modes = [mode] if isinstance(mode, str) else mode if isinstance(mode, list) else None
        if modes is None:
            flags = [key for key, value in values.items() if key.startswith("pooling_mode_") and value is True]
            modes = [key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token") for key in flags]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: expected JSON that says how {name} is pooled ({error})") from error
    found = [_OWN_NAMES.get(str(each)) for each in modes]
    if len(found) != 1 or found[0] is None:
        asked = " and ".join(map(str, modes)) or "nothing"
        raise UserError(
            f"{name}: its own {OWN_FILE} asks for pooling by {asked}, expected one of {', '.join(POOLS)}; "
            f"name one with --pooling"
        )
    return found[0]
