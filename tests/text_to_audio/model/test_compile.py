"""torch.compile of the text encoder: the same numbers, dropout included, and the same names in checkpoints."""

import shutil

import numpy as np
import pytest
import torch

import train
from helpers.stores import make_header, make_splits, make_vectors
from helpers.tiny_text_models import make_bert
from store.writing import write_store


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_a_compiled_step_is_the_plain_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    header, splits = make_header(), make_splits((20, 3, 3))
    write_store("e.h5", header, splits, make_vectors(header, splits))
    make_bert(tmp_path / "bert")
    words = "--audio-encoder muq --data-path e.h5 --text-model bert --device cpu --batch-size 4 --lora-dropout 0.2"
    words = [*words.split(), "--gradient-accumulation-steps", "2", "--text-negatives", "batch"]
    found = []
    for extra in ([], ["--compile"]):
        config = train.config_from_arguments(train.build_parser().parse_args([*words, *extra]))
        run = train.prepare(config, train.start_log("t", "t.log"))
        for module in run.modules():
            module.train()
        for name, value in run.text_encoder.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, 0, 0.2, torch.Generator().manual_seed(len(name)))
        loss = train.train_step(run, run.reader.read(0, np.arange(0, 16, 2))).item()
        gradients = {name: p.grad for name, p in run.text_encoder.named_parameters() if p.grad is not None}
        found.append((loss, gradients, list(run.text_encoder.trained_state())))
    (loss, gradients, names), (compiled_loss, compiled_gradients, compiled_names) = found
    assert compiled_loss == pytest.approx(loss, rel=1e-5)
    assert names == compiled_names
    for name, value in gradients.items():
        torch.testing.assert_close(compiled_gradients[name], value, atol=1e-5, rtol=1e-3)
