"""The text model that a plan is made for: its small files, or the published shape where they cannot be had."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, Qwen3Config

from common.errors import UserError
from text_to_audio.config import TrainingConfig
from text_to_audio.model.pretrained import small_files
from text_to_audio.planning.published import TEXT_MODELS, DecoderShape

_END = "<|endoftext|>"


@contextmanager
def text_model_at_hand(config: TrainingConfig) -> Iterator[tuple[TrainingConfig, str]]:
    """The run with its text model as a folder of small files, and where its shape is from, in words.

    A model is asked for once, however often it is measured then. Where a published one can be had neither from the hub
    nor from its cache, the folder has its known shape and a tokenizer that knows no words, and is gone afterwards. Else
    `UserError`.
    """
    name = config.text_model
    try:
        folder = small_files(name)
    except UserError as error:
        if name not in TEXT_MODELS:
            raise
        with tempfile.TemporaryDirectory() as made:
            write_shape(TEXT_MODELS[name], Path(made))
            reason = str(error).split(";")[0]
            yield replace(config, text_model=made), f"as published; its config.json could not be looked at ({reason})"
        return
    yield replace(config, text_model=str(folder)), f"{folder}/config.json"


def write_shape(shape: DecoderShape, folder: Path) -> None:
    """Write config.json of a Qwen3 of this shape, and a tokenizer that ends every text with an end token."""
    config = Qwen3Config(**asdict(shape), pad_token_id=0, eos_token_id=0, bos_token_id=None)
    config.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({_END: 0, "?": 1}, unk_token="?"))
    tokenizer.post_processor = TemplateProcessing(single=f"$A {_END}", special_tokens=[(_END, 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_END).save_pretrained(folder)
