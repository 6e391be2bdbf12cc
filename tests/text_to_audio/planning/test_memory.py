import gc

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from helpers.tiny_text_models import make_bert, make_qwen3
from text_to_audio.config import TrainingConfig
from text_to_audio.model.pretrained import without_weights
from text_to_audio.model.text_encoder import TextEncoder
from text_to_audio.planning.plan import text_encoder_on_meta
from text_to_audio.planning.tensor_memory import MemoryTracker, optimizer_tensors, tensors_of

FLOAT = 4


def test_a_storage_counts_once_and_until_nothing_holds_it():
    with MemoryTracker() as tracker:
        matrix = torch.zeros(10, 20)
        view = matrix.T[3:5]
        assert tracker.now == 200 * FLOAT
        del matrix
        assert tracker.now == 200 * FLOAT
        del view
        assert (tracker.now, tracker.peak, tracker.held) == (0, 200 * FLOAT, {})


def test_resized_storage():
    with MemoryTracker() as tracker:
        values = torch.zeros(10)
        values.resize_(100)
        assert tracker.now == 100 * FLOAT


@pytest.mark.parametrize("fake", [False, True])
def test_linear_layer_by_hand(fake):
    """y = W x, loss = sum(y * y): what autograd keeps, what the gradients take, and AdamW's two moments."""
    rows, wide, out = 7, 30, 50
    tracker = MemoryTracker()
    mode = FakeTensorMode() if fake else torch.enable_grad()
    with mode, tracker:
        layer = nn.Linear(wide, out, bias=False)
        tracker.tag("weights", tensors_of(layer))
        inputs = torch.ones(rows, wide)
        assert tracker.held == {"weights": wide * out * FLOAT, "activations": rows * wide * FLOAT}
        with tracker.phase("logits"):
            product = layer(inputs)
            square = product * product
        assert tracker.held["logits"] == 2 * rows * out * FLOAT
        loss = square.sum()
        del square  # the sum's backward needs its shape alone
        assert tracker.held["logits"] == rows * out * FLOAT
        loss.backward()
        assert tracker.held["weights"] == 2 * wide * out * FLOAT
        del loss, product
        assert tracker.held == {"weights": 2 * wide * out * FLOAT, "activations": rows * wide * FLOAT}
        optimizer = torch.optim.AdamW(layer.parameters())
        optimizer.step()
        tracker.tag("optimizer", optimizer_tensors(optimizer))
        assert tracker.held["optimizer"] == 2 * wide * out * FLOAT + FLOAT  # and the count of steps
        optimizer.zero_grad(set_to_none=True)
        assert tracker.held["weights"] == wide * out * FLOAT
        assert sum(tracker.at_peak.values()) == tracker.peak
    del layer, inputs, optimizer
    gc.collect()
    assert tracker.now == 0


@pytest.mark.parametrize("trained", [False, True])
def test_autocast_keeps_the_cast_of_a_trained_weight_to_its_end(trained):
    with FakeTensorMode(), MemoryTracker() as tracker:
        layer = nn.Linear(64, 64, bias=False).requires_grad_(trained)
        inputs = torch.ones(1, 64)
        before = tracker.now
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            layer(inputs)
            assert tracker.now - before == (64 * 64 * 2 if trained else 0)
        assert tracker.now == before


def run_blocks(checkpointing):
    """Peak of four blocks, forward and backward, less their weights and gradients."""
    with FakeTensorMode(), MemoryTracker() as tracker:
        blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 800), nn.GELU(), nn.Linear(800, 8)) for _ in range(4))
        tracker.tag("weights", tensors_of(blocks))
        hidden = torch.ones(1000, 8, requires_grad=True)
        for block in blocks:
            hidden = checkpoint(block, hidden, use_reentrant=False) if checkpointing else block(hidden)
        kept = tracker.held["activations"]
        hidden.sum().backward()
        return kept, tracker.at_peak["activations"]


def test_checkpointing_by_hand():
    wide, narrow = 1000 * 800 * FLOAT, 1000 * 8 * FLOAT
    kept, peak = run_blocks(checkpointing=False)
    assert kept == 4 * 2 * wide + 5 * narrow  # each block keeps GELU's input and output; the narrow ones are between
    kept_with, peak_with = run_blocks(checkpointing=True)
    assert kept_with == 5 * narrow
    assert 3 * wide <= peak_with <= 4 * wide + 8 * narrow  # one block's two, and gradients of them
    assert peak > peak_with + 5 * wide


@pytest.mark.parametrize(("kind", "checkpointing"), [("qwen3", "on"), ("qwen3", "off"), ("bert", "off")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fake_tensors_take_what_real_ones_take(kind, checkpointing, precision, tmp_path):
    """The text encoder forward and backward, twice, on real CPU tensors and on fake ones."""
    folder = (make_qwen3 if kind == "qwen3" else make_bert)(tmp_path)
    config = TrainingConfig(
        "muq", text_model=folder, device="cpu", precision=precision, gradient_checkpointing=checkpointing
    )

    def measure(encoder):
        trained = [each for each in encoder.parameters() if each.requires_grad]
        tracker.tag("base", [each for each in tensors_of(encoder) if not each.requires_grad])
        tracker.tag("lora", trained)
        for _ in range(2):
            ids, mask = torch.ones(2, 5, 17, dtype=torch.int64)
            mask[0, 9:] = 0  # without padding transformers leaves the mask away, if it can look
            encoder.train().encode(torch.stack((ids, mask))).sum().backward()
        return tracker.peak, tracker.at_peak, tracker.held

    with MemoryTracker() as tracker:
        real = measure(TextEncoder(config, without_weights(config)))
    on_meta = text_encoder_on_meta(config)
    with FakeTensorMode(allow_non_fake_inputs=True), MemoryTracker() as tracker:
        fake = measure(on_meta.to_empty(device="cpu"))
    assert real == fake
    trained_bytes = sum(p.nbytes for p in TextEncoder(config).parameters() if p.requires_grad)
    assert trained_bytes < real[1]["lora"] <= 2 * trained_bytes
