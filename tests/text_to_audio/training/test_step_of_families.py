"""Text models of 25 families: one training step and one evaluation by train.py's own code, or the line that refuses."""

import logging

import pytest
import torch

import train
from common.errors import UserError
from helpers.stores import make_header, make_splits, make_vectors
from helpers.text_families import FAMILIES, make_family
from store.writing import write_store
from text_to_audio.measuring.evaluation import Evaluator

REFUSED = {
    "FNet": "alone and padded beside a longer one",
    "Funnel": "alone and padded beside a longer one",
    "Mamba": "LoRA cannot be put on its linear layers",
}
MEAN = {name for name in FAMILIES if "BERT" in name} | {"XLM-R", "MPNet", "DeBERTa", "Electra", "Nomic", "Longformer"}
MEAN |= {"T5 encoder", "EmbeddingGemma"}
SETTINGS = "--audio-encoder latent --device cpu --max-length 64 --epochs 1 --batch-size 4 --hidden-dim 8 --text-lr 1e-2"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Eight captions to train on, which is one step of two micro-batches, and three in each of the other splits."""
    path = tmp_path_factory.mktemp("store") / "embeddings.h5"
    header, splits = make_header(), make_splits((8, 3, 3), captions=1)
    write_store(path, header, splits, make_vectors(header, splits))
    return path


def one_step(folder, store, checkpointing):
    """The run after its one step, its loss, and how many numbers of the step were kept for its backward pass."""
    words = ["--gradient-accumulation-steps", "2", "--gradient-checkpointing", checkpointing, "--data-path", str(store)]
    config = train.config_from_arguments(
        train.build_parser().parse_args([*SETTINGS.split(), *words, "--text-model", folder])
    )
    train.choose(config, train.train_step)
    run = train.prepare(config, logging.getLogger("families"))
    kept = 0

    def keep(tensor):
        nonlocal kept
        kept += tensor.numel()
        return tensor

    for module in run.modules():
        module.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        (loss,) = train.train_epoch(run, 1)
    assert run.step == run.steps == 1
    return run, loss, kept


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_step_and_an_evaluation_with_and_without_checkpointing(tmp_path, store, name):
    folder = make_family(name, tmp_path / "model")
    if name in REFUSED:
        for checkpointing in ("off", "on"):
            with pytest.raises(UserError, match=REFUSED[name]) as caught:
                one_step(folder, store, checkpointing)
            assert "\n" not in str(caught.value)
        return
    weights, losses, kept = [], [], []
    for checkpointing in ("off", "on"):
        run, loss, numbers = one_step(folder, store, checkpointing)
        assert run.config.pooling == ("mean" if name in MEAN else "last")
        assert run.text_encoder.layers >= 1
        assert run.text_encoder.recomputed == (run.text_encoder.layers if checkpointing == "on" else 0)
        weights.append(run.text_encoder.trained_state())
        losses.append(loss)
        kept.append(numbers)
        (space,) = run.spaces
        for split in ("val", "test"):
            measured = Evaluator(run.text_encoder, run.store, split, space.config)
            found = measured.measure(run.text_encoder, space.projection)
            assert 0 < found["t2a_MRR"] <= 1
    moved = [float(value.abs().sum()) > 0 for name, value in weights[0].items() if "lora_B" in name]
    assert sum(moved) >= max(4, len(moved) // 2)  # Longformer's global attention has no token here
    assert losses[0] == losses[1]  # the same dropout
    for one, other in zip(weights[0].values(), weights[1].values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert kept[1] < 0.5 * kept[0]
