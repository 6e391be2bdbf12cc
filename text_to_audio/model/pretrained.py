"""The frozen text model as it is published: its tokenizer and backbone, with weights or, for a plan, without."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as transformers_logging

from common.errors import UserError
from common.hub import fetch_model_folder
from text_to_audio.config import Pooling, TrainingConfig
from text_to_audio.model.forward_pass import compiles_by_layer
from text_to_audio.model.held_weights import is_narrower, published_dtype
from text_to_audio.model.pooling import model_pooling

SMALL_FILES = ["*.json", "*.txt", "*.model"]  # all of a model's folder but its weights


class Pretrained(NamedTuple):
    """A text model's parts; `revision` is the hub's, None for a local folder.

    held: the type in which a query on a CPU holds the weights.
    """

    tokenizer: PreTrainedTokenizerBase
    backbone: PreTrainedModel
    revision: str | None
    held: torch.dtype = torch.float32


def load_pretrained(config: TrainingConfig, for_queries: bool = False) -> Pretrained:
    """Tokenizer and backbone with their weights, in the run's precision; `UserError` where they cannot be had whole.

    for_queries: on a CPU the weights of a decoder that were published in 16 bits stay so; see `held_weights`.
    """
    name = config.text_model
    folder = _fetch(name)
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # one bar for loading weights would tear the training log
    try:
        with _one_line_errors(name, folder):
            tokenizer = AutoTokenizer.from_pretrained(folder)
            kind, text_config = _text_part(name, AutoConfig.from_pretrained(folder))
            held = _held_dtype(folder, kind, text_config)
            narrow = for_queries and config.torch_device.type == "cpu" and is_narrower(held, _dtype(config))
            dtype = held if narrow else _dtype(config)
            backbone, report = kind.from_pretrained(folder, config=text_config, dtype=dtype, output_loading_info=True)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
    _require_weights(name, backbone, report)
    if config.bf16 and config.torch_device.type == "cuda" and is_flash_attn_2_available():
        with suppress(ValueError):  # a model that has no such attention keeps torch's (SDPA)
            backbone.set_attn_implementation("flash_attention_2")
    return _checked(folder, tokenizer, backbone)._replace(held=held)


def without_weights(config: TrainingConfig) -> Pretrained:
    """Tokenizer and backbone from the text model's small files alone; its weights are neither fetched nor read.

    The parameters are as torch and transformers initialise them, or fake under `FakeTensorMode`. Raises `UserError`
    where there is no config.json or no tokenizer.
    """
    name = config.text_model
    folder = small_files(name)
    with _one_line_errors(name, folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        kind, text_config = _text_part(name, AutoConfig.from_pretrained(folder))
        backbone = kind.from_config(text_config, dtype=_dtype(config))
    return _checked(folder, tokenizer, backbone)


def resolved_pooling(config: TrainingConfig) -> Pooling:
    """How a run that begins now pools its text model: what the settings say, or what the model asks for."""
    if config.pooling != "auto":
        return config.pooling
    folder = small_files(config.text_model)
    with _one_line_errors(config.text_model, folder):
        _, text_config = _text_part(config.text_model, AutoConfig.from_pretrained(folder))
    return model_pooling(config.text_model, folder, text_config)


def _text_part(
    name: str, config: PretrainedConfig
) -> tuple[type[AutoModel | AutoModelForTextEncoding], PretrainedConfig]:
    """The automatic class and the config that load a model's text encoder, which may be a part of it.

    Of an encoder-decoder that is its encoder, where transformers can load that alone (T5); of a model with more than
    text, its text tower (CLIP, Gemma 3). `UserError` for what has no such part.
    """
    kinds = MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
    if config.is_encoder_decoder:
        if config.model_type not in kinds:
            raise UserError(
                f"{name}: expected a text encoder or a decoder-only model, found the encoder-decoder "
                f"{config.model_type}"
            )
        return AutoModelForTextEncoding, config
    text_config = getattr(config, "text_config", None) or config
    if not hasattr(text_config, "hidden_size"):
        raise UserError(f"{name}: expected a text model, found {config.model_type}, whose config has no hidden_size")
    return AutoModelForTextEncoding if text_config.model_type in kinds else AutoModel, text_config


def _require_weights(name: str, backbone: PreTrainedModel, report: dict) -> None:
    """`UserError` where weights that texts pass through were not in the file, or had another shape."""
    passed_by = ("pooler", "lm_head", "classifier", "position_ids")  # sentence embeddings do not go through these
    missing = sorted(key for key in report["missing_keys"] if not any(part in key for part in passed_by))
    other = sorted(str(each[0] if isinstance(each, tuple) else each) for each in report.get("mismatched_keys", ()))
    if missing or other:
        count = sum(1 for _ in backbone.state_dict())
        raise UserError(
            f"{name}: expected the weights of a {backbone.config.model_type}, found {len(missing + other)} of {count} "
            f"missing or of another shape, such as {(missing + other)[0]}; they would be random numbers"
        )


def small_files(name: str) -> Path:
    """Folder with all of a model's files but its weights; `UserError` where there is no config.json."""
    folder = fetch_model_folder(name, SMALL_FILES)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: expected a text model in the Hugging Face format, found no config.json")
    return folder


def _held_dtype(
    folder: Path, kind: type[AutoModel | AutoModelForTextEncoding], config: PretrainedConfig
) -> torch.dtype:
    """The type in which a query on a CPU holds a model's weights: the published one, where we compute the layers."""
    published = published_dtype(folder)
    if published == torch.float32:
        return published
    with torch.device("meta"):
        return published if compiles_by_layer(kind.from_config(config)) else torch.float32


def _dtype(config: TrainingConfig) -> torch.dtype:
    return torch.bfloat16 if config.bf16 else torch.float32


def _fetch(name: str) -> Path:
    """The model's folder, downloaded if need be: its safetensors, or, where it has none, torch's own format."""
    folder = fetch_model_folder(name, [*SMALL_FILES, "*.safetensors"])
    if not any(folder.glob("*.safetensors")):
        folder = fetch_model_folder(name, [*SMALL_FILES, "pytorch_model*.bin"])
    return folder


@contextmanager
def _one_line_errors(name: str, folder: Path) -> Iterator[None]:
    """Failures of transformers as a `UserError` of one line, whatever they are: each library below has its own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        pointers = sorted(path.name for path in folder.iterdir() if path.is_file() and _is_lfs_pointer(path))
        if pointers:
            reason = f"{', '.join(pointers)}: Git LFS pointers, not the files themselves: run `git lfs pull` there"
        else:
            reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise UserError(f"{name}: expected a text model in the Hugging Face format; {reason}") from error


def _is_lfs_pointer(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(24) == b"version https://git-lfs."


def _checked(folder: Path, tokenizer: PreTrainedTokenizerBase, backbone: PreTrainedModel) -> Pretrained:
    tokenizer.truncation_side = "right"  # the instruction stands in front and must stay
    return Pretrained(tokenizer, backbone, folder.name if folder.parent.name == "snapshots" else None)
