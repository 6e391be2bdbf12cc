"""The frozen text model as it is published: its tokenizer and backbone, with weights or, for a plan, without."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as transformers_logging

from common.errors import UserError
from common.hub import fetch_model_folder
from text_to_audio.config import TrainingConfig

SMALL_FILES = ["*.json", "*.txt", "*.model"]  # all of a model's folder but its weights


class Pretrained(NamedTuple):
    """A text model's parts; `revision` is the hub's, None for a local folder."""

    tokenizer: PreTrainedTokenizerBase
    backbone: nn.Module
    revision: str | None


def load_pretrained(config: TrainingConfig) -> Pretrained:
    """Tokenizer and backbone with their weights, in the run's precision; `UserError` where they cannot be had."""
    name = config.text_model
    folder = _fetch(name)
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # one bar for loading weights would tear the training log
    try:
        with _one_line_errors(name):
            tokenizer = AutoTokenizer.from_pretrained(folder)
            backbone = AutoModel.from_pretrained(folder, dtype=_dtype(config))
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
    if config.bf16 and config.torch_device.type == "cuda" and is_flash_attn_2_available():
        with suppress(ValueError):  # a model that has no such attention keeps torch's (SDPA)
            backbone.set_attn_implementation("flash_attention_2")
    return _checked(name, folder, tokenizer, backbone)


def without_weights(config: TrainingConfig) -> Pretrained:
    """Tokenizer and backbone from the text model's small files alone; its weights are neither fetched nor read.

    The parameters are as torch and transformers initialise them, or fake under `FakeTensorMode`. Raises `UserError`
    where there is no config.json or no tokenizer.
    """
    name = config.text_model
    folder = fetch_model_folder(name, SMALL_FILES)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: expected a text model in the Hugging Face format, found no config.json")
    with _one_line_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        backbone = AutoModel.from_config(AutoConfig.from_pretrained(folder), dtype=_dtype(config))
    return _checked(name, folder, tokenizer, backbone)


def _dtype(config: TrainingConfig) -> torch.dtype:
    return torch.bfloat16 if config.bf16 else torch.float32


def _fetch(name: str) -> Path:
    """The model's folder, downloaded if need be: its safetensors, or, where it has none, torch's own format."""
    folder = fetch_model_folder(name, [*SMALL_FILES, "*.safetensors"])
    if not any(folder.glob("*.safetensors")):
        folder = fetch_model_folder(name, [*SMALL_FILES, "pytorch_model*.bin"])
    return folder


@contextmanager
def _one_line_errors(name: str) -> Iterator[None]:
    """Failures of transformers as a `UserError` of one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name}: expected a text model in the Hugging Face format; {' '.join(str(error).split())}"
        ) from error


def _checked(name: str, folder: Path, tokenizer: PreTrainedTokenizerBase, backbone: nn.Module) -> Pretrained:
    if backbone.config.is_encoder_decoder:
        raise UserError(f"{name}: expected a text encoder or a decoder-only model, found an encoder-decoder")
    tokenizer.truncation_side = "right"  # the instruction stands in front and must stay
    return Pretrained(tokenizer, backbone, folder.name if folder.parent.name == "snapshots" else None)
