"""torch.compile of the text encoder: the same numbers, dropout included, compiled few times, the same names."""

import logging
import shutil

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import train
from common.errors import UserError
from helpers.stores import make_header, make_splits, make_vectors
from helpers.tiny_text_models import make_bert, make_qwen3
from store.writing import write_store
from text_to_audio.config import TrainingConfig
from text_to_audio.model.text_encoder import TextEncoder

needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    header, splits = make_header(), make_splits((20, 3, 3))
    splits["train"].caption = [f"{'calm happy piano ' * (i % 5)}song {i}." for i in range(40)]
    write_store(folder / "e.h5", header, splits, make_vectors(header, splits))
    make_bert(folder / "bert")
    make_qwen3(folder / "qwen3")
    return folder


def make_run(folder, name, *words):
    fixed = ["--audio-encoder", "muq", "--data-path", str(folder / "e.h5"), "--text-model", str(folder / name)]
    fixed += ["--device", "cpu", "--batch-size", "3", "--lora-dropout", "0.2", "--gradient-accumulation-steps", "4"]
    config = train.config_from_arguments(train.build_parser().parse_args([*fixed, *words]))
    run = train.prepare(config, logging.getLogger("test"))
    for module in run.modules():
        module.train()
    for name, value in run.text_encoder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, 0, 0.2, torch.Generator().manual_seed(len(name)))
    return run


def step(run):
    """Loss and gradients of a step whose passes have 2 and 3 texts of several lengths."""
    run.optimizer.zero_grad()
    loss = train.train_step(run, run.reader.read(run.step, np.arange(0, 33, 3))).item()
    return loss, {name: p.grad for name, p in run.text_encoder.named_parameters() if p.grad is not None}


@pytest.mark.slow
@needs_a_compiler
@pytest.mark.parametrize("name", ["qwen3", "bert"])
def test_a_compiled_step_is_the_plain_step(name, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--text-negatives", "batch"]
    plain, compiled = make_run(folder, name, *words), make_run(folder, name, *words, "--compile", "on")
    assert list(plain.text_encoder.trained_state()) == list(compiled.text_encoder.trained_state())
    (loss, expected), (compiled_loss, found) = step(plain), step(compiled)
    assert compiled_loss == pytest.approx(loss, rel=1e-5)
    for each, value in expected.items():
        torch.testing.assert_close(found[each], value, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
@needs_a_compiler
def test_all_layers_and_lengths_share_one_compilation(folder, tmp_path, monkeypatch):
    """Whether layers are recomputed or not, which happens outside of what is compiled; dropout does not disturb it."""
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    counters.clear()
    _, expected = step(make_run(folder, "qwen3", "--compile", "on"))
    assert counters["stats"]["unique_graphs"] <= 2
    monkeypatch.setattr(TrainingConfig, "layers_recomputed", lambda *_: 1)
    _, found = step(make_run(folder, "qwen3", "--compile", "on"))
    assert counters["stats"]["unique_graphs"] <= 2
    assert counters["graph_break"].total() == 0
    for each, value in expected.items():
        torch.testing.assert_close(found[each], value, atol=1e-6, rtol=1e-5)


def test_what_cannot_be_compiled_is_said(folder):
    config = TrainingConfig(
        "muq", text_model=str(folder / "bert"), device="cpu", compile="on", gradient_checkpointing="on"
    )
    with pytest.raises(UserError, match="--compile on: expected --gradient-checkpointing off"):
        TextEncoder(config)
