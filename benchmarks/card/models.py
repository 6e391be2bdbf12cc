"""Models of the published sizes with random weights, and a store of random vectors: what the card is measured with."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from transformers import Qwen3Config

from benchmarks.preparing.full_size import QWEN3_SHAPE, write_encoder
from benchmarks.training.captions import random_captions
from embedding_models.registry import ENCODERS
from examples import make_tiny_models as tiny
from store.reading import Split, StoreHeader, statistics_block, vector_block
from store.writing import create_store, row_chunks
from text_to_audio.config import TrainingConfig
from text_to_audio.model import text_encoder as text_encoder_module
from text_to_audio.model.pretrained import Pretrained, without_weights

LAYERS = 36
DIMS = {name: ENCODERS[name].dim for name in tiny.FOLDERS}
CAPTIONS = {"train": 4096, "val": 1056, "test": 64}
RECORDINGS = {"train": 47_488, "val": 528, "test": 32}
COPIES = 10  # recordings of one source


def write_encoders(folder: Path, small: bool) -> None:
    """Checkpoints of the three encoders in the published formats: of published size, or tiny."""
    folder.mkdir(parents=True)
    if small:
        tiny.main(["--out", str(folder)])
        return
    for name in tiny.FOLDERS:
        write_encoder(name, folder)


def write_text_model(folder: Path, small: bool) -> Path:
    """The tokenizer and config.json of a Qwen3 of 4 B (or a tiny one) without its weights; returns their folder."""
    tokenizer = tiny.train_tokenizer()
    end = tokenizer.eos_token_id
    shape = tiny.QWEN3_SHAPE if small else QWEN3_SHAPE | {"num_hidden_layers": LAYERS}
    config = Qwen3Config(**shape, pad_token_id=end, eos_token_id=end, bos_token_id=None)
    tokenizer.save_pretrained(folder / "qwen3-random")
    config.save_pretrained(folder / "qwen3-random")
    return folder / "qwen3-random"


@contextmanager
def made_on_the_device() -> Iterator[None]:
    """Text models get random weights on the run's device instead of weights from a file."""

    def made(config: TrainingConfig) -> Pretrained:
        torch.manual_seed(0)
        with torch.device(config.torch_device):
            return without_weights(config)

    with mock.patch.object(text_encoder_module, "load_pretrained", made):
        yield


def write_store(path: Path, small: bool) -> None:
    """A store of MusicBench's size (or a small one) in float16; one block of random vectors is repeated."""
    scale, dims = (0.01, dict.fromkeys(DIMS, 8)) if small else (1, DIMS)
    rng = np.random.default_rng(0)
    entry = {"id": "random", "revision": None, "sample_rate": 24_000, "recipe": "none"}
    header = StoreHeader("random", None, 0, "float16", {name: {**entry, "dim": dim} for name, dim in dims.items()})
    splits = {}
    for name, rows in RECORDINGS.items():
        rows, captions = max(COPIES, int(rows * scale)), max(COPIES, int(CAPTIONS[name] * scale))
        ids = [f"{name}{row}" for row in range(rows)]
        copies = COPIES if name == "train" else 1
        sources = [f"{name}-source{row // copies}" for row in range(rows)]
        rows_of = np.sort(np.arange(captions) * 7 % rows)
        splits[name] = Split(ids, sources, random_captions(rng, captions), rows_of, ["main"] * captions)
    blocks = create_store(path, header, splits)
    for encoder, dim in dims.items():
        block = rng.standard_normal((512, dim), np.float32)
        for name in splits:
            for chunk in row_chunks(blocks[vector_block(name, encoder)].map(path, "r+"), len(block)):
                chunk[:] = block[: len(chunk)]
        for which, values in (("mean", block.mean(0)), ("std", block.std(0))):
            blocks[statistics_block(encoder, which)].map(path, "r+")[:] = values
