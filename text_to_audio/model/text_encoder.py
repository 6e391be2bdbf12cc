"""The text encoder: a frozen pretrained model with LoRA, texts to sentence embeddings."""

import warnings
from collections.abc import Callable
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from text_to_audio.config import TrainingConfig
from text_to_audio.model.forward_pass import forward_pass, layers_of
from text_to_audio.model.held_weights import is_narrower, widen_around
from text_to_audio.model.pooling import POOLS, family_pooling
from text_to_audio.model.pretrained import Pretrained, load_pretrained

POSITION_EMBEDDINGS = {"position_embeddings", "position_embedding", "wpe"}  # as the families call them
EMBEDDED_TOKENS = 8192  # in one pass without gradients: enough to keep a large GPU busy
TASK = "Given a description of music, find the recordings that it describes"


class TextEncoder(nn.Module):
    """A frozen Hugging Face text encoder with LoRA on its linear layers: texts to sentence embeddings.

    `model` is the PEFT model; it takes the LoRA weights alone under a strict `load_state_dict`. The embeddings have
    unit length, as the model cards of sentence encoders have it. Placed on the config's device.

    parts: the tokenizer and the backbone to build on, where they are not to be loaded from `config.text_model`.
    """

    def __init__(self, config: TrainingConfig, parts: Pretrained | None = None):
        super().__init__()
        self.name, self.max_length = config.text_model, config.max_length
        self.bf16 = config.bf16
        self.tokenizer, backbone, self.revision, self.held = parts or load_pretrained(config)
        backbone.config.use_cache = False
        self.attention = backbone.config._attn_implementation
        kind = backbone.config.model_type
        self.prefix = _prefix(config.instruction, kind)
        self.pooling = family_pooling(kind) if config.pooling == "auto" else config.pooling
        self.end_token = _end_token(self.tokenizer, self.name) if self.pooling == "last" else None
        self.pad_token = self.tokenizer.pad_token_id or 0  # masked, so any valid id will do
        self.dim = backbone.config.hidden_size
        _check_length(config, backbone, len(self._token_ids([""])[0]))
        with warnings.catch_warnings():  # transformers' older names, which its whole range and peft know
            warnings.simplefilter("ignore", FutureWarning)
            self.model = add_lora(backbone, config)
        if not self.bf16 and is_narrower(backbone.dtype, torch.float32):
            widen_around(self.model.get_base_model())
        self.layers = len(layers_of(backbone))
        self.recomputed = config.layers_recomputed(self.layers)
        self._pass = forward_pass(self.model, self.recomputed, config.compile == "on")
        self.to(config.torch_device)

    def _apply(self, change: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(change, recurse)
        self._pass.tie()
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def tokenise(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, int32, with the instruction in front, cut to `max_length`, end token kept."""
        rows = [np.array(ids, np.int32) for ids in self._token_ids(texts)]
        if self.end_token is not None:
            for ids in rows:
                ids[-1] = self.end_token  # some tokenizers cut it off together with a long text's end
        return rows

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        prefixed = [self.prefix + text for text in texts]
        return self.tokenizer(prefixed, truncation=True, max_length=self.max_length)["input_ids"]

    def encode(self, tokens: Tensor) -> Tensor:
        """Sentence embeddings of texts padded on the right: (2, batch, length) ids and mask -> (batch, dim) float32.

        They have unit length. Raises `ValueError` for padding in front, where the mask can be looked at for nothing.
        """
        if type(tokens) is Tensor and tokens.is_cpu and not tokens[1, :, 0].all():
            raise ValueError("expected texts padded on the right, found padding in front of one")
        ids, mask = tokens.to(self.device, non_blocking=True)
        hidden = self._pass(ids, mask, self.training)
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))  # a bf16 base is pooled in float32
        return F.normalize(POOLS[self.pooling](hidden, mask), dim=-1)

    def forward(self, texts: list[str]) -> Tensor:
        """Sentence embeddings of texts: (batch, dim) float32 on the encoder's device, unit length."""
        return self.encode(pad_tokens(self.tokenise(texts), self.pad_token))

    def trained_state(self) -> dict[str, Tensor]:
        """The LoRA weights alone, on the CPU, by their names in `model`."""
        return {
            name: parameter.detach().cpu()
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }


def token_batches(lengths: np.ndarray, budget: int = EMBEDDED_TOKENS) -> list[np.ndarray]:
    """Texts of these lengths in batches of like lengths and at most `budget` tokens, padding included; at least one.

    Returns arrays of the texts' numbers, the shortest texts first.
    """
    order = np.argsort(lengths, kind="stable")
    starts, start = [], 0
    for i, length in enumerate(lengths[order].tolist()):
        if i > start and (i + 1 - start) * length > budget:
            starts.append(i)
            start = i
    return np.split(order, starts) if len(order) else []


def pad_tokens(rows: list[np.ndarray], pad_token: int) -> Tensor:
    """Token ids and attention mask, (2, batch, longest) int64, padded on the right."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.full(mask.shape, pad_token, np.int64)
    ids[mask] = np.concatenate(rows)
    return torch.from_numpy(np.stack((ids, mask)))


def _prefix(instruction: str, kind: str) -> str:
    """What stands before each text; the form is Qwen3-Embedding's model card's."""
    if instruction == "auto":
        instruction = TASK if kind.startswith("qwen") else ""
    return f"Instruct: {instruction}\nQuery:" if instruction else ""


def _end_token(tokenizer: PreTrainedTokenizerBase, name: str) -> int:
    """The id the tokenizer puts at the end of every text; without one the last token would be any word."""
    last = tokenizer("music")["input_ids"][-1]
    if last not in tokenizer.all_special_ids:
        raise UserError(
            f"{name}: pooling by the last token needs a tokenizer that ends every text with an end token, "
            f"found {tokenizer.convert_ids_to_tokens(last)!r} at the end; use --pooling mean or another model"
        )
    return last


def usable_positions(backbone: nn.Module) -> int | None:
    """How many tokens a text may have: what the position embeddings hold, else the config's word; None: no limit.

    RoBERTa and its like count positions from after the padding's, so that two of their 514 are never a token's.
    """
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Embedding) and name.split(".")[-1] in POSITION_EMBEDDINGS:
            taken = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - taken
    said = getattr(backbone.config, "max_position_embeddings", None)
    return said if isinstance(said, int) and said > 0 else None


def _check_length(config: TrainingConfig, backbone: nn.Module, shortest: int) -> None:
    positions = usable_positions(backbone)
    if positions is not None and config.max_length > positions:
        raise UserError(f"{config.text_model}: has {positions} positions, found max_length {config.max_length}")
    if shortest >= config.max_length:
        raise UserError(
            f"{config.text_model}: expected max_length to leave room for a text after the instruction, "
            f"found max_length {config.max_length} and {shortest} tokens around an empty text"
        )


def add_lora(backbone: nn.Module, config: TrainingConfig) -> PeftModel:
    """Freeze the backbone and put float32 LoRA matrices (Hu et al. 2021) on all its linear layers.

    A pooler (BERT's) is left out: sentence embeddings do not pass through it. The returned PEFT model loads the
    trained weights alone under `strict=True`; what is frozen is filled in from the model itself.
    """
    has_pooler = any("pooler" in name for name, _ in backbone.named_modules())
    lora = LoraConfig(
        task_type=TaskType.FEATURE_EXTRACTION,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # PEFT divides it by the rank: a float serves as well
        lora_dropout=config.lora_dropout,
        target_modules="all-linear",
        exclude_modules=r".*pooler.*" if has_pooler else None,
    )
    try:
        model = get_peft_model(backbone, lora)
    except ValueError as error:  # PEFT knows families that LoRA does not serve
        raise UserError(
            f"{config.text_model}: LoRA cannot be put on its linear layers ({' '.join(str(error).split())[:200]})"
        ) from error
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def fill_frozen(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
        for name, value in module.state_dict(prefix=prefix).items():
            if name.removeprefix(prefix) not in trained:
                state_dict.setdefault(name, value)

    model.register_load_state_dict_pre_hook(fill_frozen)
    return model
