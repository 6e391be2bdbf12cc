"""The text side on a CUDA card: a step, its memory, compiled layers, going on after a kill, evaluation, export."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

import evaluate
import export
import train
from common.errors import Stopped
from helpers.stores import make_header, make_splits, make_vectors
from helpers.tiny_text_models import make_bert, make_qwen3
from store.reading import EmbeddingStore
from store.writing import write_store
from text_to_audio.loss.bank import AudioBank, bank_loss
from text_to_audio.model.head import ProjectionHead
from text_to_audio.planning.choosing import choose
from text_to_audio.planning.footprint import Shape, footprint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    header, splits = make_header(), make_splits((40, 6, 6))
    splits["train"].caption = [f"{'calm happy piano ' * (i % 5)}song {i}." for i in range(80)]
    write_store("e.h5", header, splits, make_vectors(header, splits))
    make_bert(tmp_path / "bert")
    make_qwen3(tmp_path / "qwen3")
    return tmp_path


def config_of(*words, device="cuda"):
    fixed = ["--audio-encoder", "muq", "--data-path", "e.h5", "--device", device, "--batch-size", "4"]
    fixed += ["--gradient-accumulation-steps", "3", "--hidden-dim", "16"]
    return train.config_from_arguments(train.build_parser().parse_args([*fixed, *words]))


def make_run(config):
    run = train.prepare(config, logging.getLogger("test"))
    for module in run.modules():
        module.train()
    for name, value in run.text_encoder.named_parameters():
        if "lora_B" in name:
            filled = torch.empty(value.shape).normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
            value.data.copy_(filled)
    return run


def gradient(run):
    """Loss and all gradients of one step, on the CPU in one vector."""
    run.optimizer.zero_grad()
    loss = train.train_step(run, run.reader.read(run.step, np.arange(0, 48, 4)))
    trained = [p for module in run.modules() for p in module.parameters() if p.grad is not None]
    return loss.item(), torch.cat([p.grad.flatten().cpu() for p in trained])


@pytest.mark.parametrize(("precision", "close"), [("fp32", 2e-3), ("bf16", 0.2)])
@pytest.mark.parametrize("objective", ["micro", "batch", "bank"])
@pytest.mark.parametrize("model", ["qwen3", "bert"])
def test_a_step_is_the_cpu_s(model, objective, precision, close, folder):
    """Without dropout, whose masks differ. The head's products are TF32, so that fp32 is not to the last digit."""
    words = ["--text-model", model, "--lora-dropout", "0", "--head-dropout", "0", "--audio-negatives", objective]
    loss, expected = gradient(make_run(config_of(*words, "--precision", "fp32", device="cpu")))
    found_loss, found = gradient(make_run(config_of(*words, "--precision", precision)))
    assert found_loss == pytest.approx(loss, rel=max(close, 1e-2) / 4)
    assert (found - expected).norm() < close * expected.norm()


@pytest.mark.parametrize("recomputed", [0, 1, 2])
def test_compiled_layers_draw_the_same_dropout(recomputed, folder):
    words = ["--text-model", "qwen3", "--precision", "fp32", "--lora-dropout", "0.2", "--text-negatives", "batch"]
    found = []
    for compiled in ("off", "on"):
        config = config_of(*words, "--compile", compiled)
        config.recomputed_layers = recomputed
        run = make_run(config)
        found.append(gradient(run))
        tokens = run.reader.read(0, np.arange(0, 48, 4))
        passes = []
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                passes.append(run.embed(tokens, 0).detach())
        torch.testing.assert_close(*passes, atol=1e-5, rtol=0)  # what gradient caching stands on
    (loss, plain), (compiled_loss, compiled) = found
    assert compiled_loss == pytest.approx(loss, rel=1e-4)
    assert (compiled - plain).norm() < 2e-3 * plain.norm()


@pytest.mark.parametrize("recomputed", [0, 4, 8])
def test_the_plan_is_within_a_tenth_of_the_peak(recomputed, folder):
    """A step of texts as long as they may be; small enough for a second, large enough to drown the rounding."""
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
    shape |= {"num_key_value_heads": 4, "head_dim": 64, "vocab_size": 400, "max_position_embeddings": 512}
    Qwen3Model(Qwen3Config(**shape)).save_pretrained("wide")
    AutoTokenizer.from_pretrained("qwen3").save_pretrained("wide")
    words = ["--text-model", "wide", "--max-length", "160", "--compile", "off", "--batch-size", "16"]
    config = config_of(*words, "--gradient-accumulation-steps", "2")
    config.recomputed_layers = recomputed
    planned = footprint(config, Shape.of(EmbeddingStore("e.h5"), ("muq",)), train.train_step).total
    run = make_run(config)
    data = run.reader.read(0, np.arange(0, 64, 2))
    for number, tokens in data.tokens.items():
        data.tokens[number] = torch.ones(2, tokens.shape[1], 160, dtype=torch.int64).pin_memory()
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        train.train_step(run, data)
        run.optimizer.step()
        run.optimizer.zero_grad()
    assert planned == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)


def test_auto_is_chosen_on_the_card(folder):
    config = config_of("--text-model", "qwen3")
    choose(config, train.train_step)
    assert (config.compile, config.recomputed_layers) == ("off", 0)  # a short run, and much room


def test_a_run_goes_on_and_is_evaluated_and_exported(folder):
    """Stopped in the second epoch; what the resumed run ends with is the uninterrupted one's to the last digit."""
    words = ["--audio-encoder", "muq", "--data-path", "e.h5", "--device", "cuda", "--text-model", "qwen3"]
    words += ["--batch-size", "4", "--gradient-accumulation-steps", "2", "--epochs", "3", "--hidden-dim", "16"]
    train.main([*words, "--checkpoint-dir", "whole"])
    original = train.train_step

    def stopped(run, data):
        if run.step == 14:
            raise Stopped(15, "as if a signal had come")
        return original(run, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", stopped)
        with pytest.raises(Stopped):
            train.main([*words, "--checkpoint-dir", "parts"])
    train.main([*words, "--checkpoint-dir", "parts", "--resume", "auto"])
    whole, parts = (
        torch.load(Path(name) / "muq_last.pt", weights_only=True)["text_encoder_state_dict"]
        for name in ("whole", "parts")
    )
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-6, rtol=1e-4)

    evaluate.main(["--checkpoint", "whole/muq_best_r1.pt", "--data-path", "e.h5", "--device", "cuda"])
    export.main(["--checkpoint", "whole/muq_best_r1.pt", "--out", "out"])
    assert load_file(Path("out") / "adapter" / "adapter_model.safetensors")


def test_a_bank_in_half_precision_is_multiplied_as_it_is():
    """Against the same bank copied to float32: the loss and its gradient within what half precision rounds."""

    class Rows:
        dim = 300
        values = torch.randn(500, 300, generator=torch.Generator().manual_seed(0))

        def __len__(self):
            return 500

        def block(self, start, stop):
            return self.values[start:stop]

    head, text = ProjectionHead(8, 8, 300).cuda(), torch.randn(16, 300, device="cuda")
    text = torch.nn.functional.normalize(text, dim=-1).requires_grad_()
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        bank = AudioBank(Rows(), np.arange(500) // 2, head, dtype, "device")
        loss = bank_loss(text, np.arange(16), bank, 0.07)
        found.append((loss.detach(), *torch.autograd.grad(loss, text)))
    torch.testing.assert_close(found[1][0], found[0][0], atol=2e-3, rtol=0)
    assert (found[1][1] - found[0][1]).norm() < 1e-2 * found[0][1].norm()
