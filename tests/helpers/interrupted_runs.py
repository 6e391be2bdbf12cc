"""Small runs of train.py that are interrupted and go on, for the tests of both, and what they leave."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from helpers.stores import make_header, make_splits, make_vectors
from helpers.tiny_text_models import make_bert, make_qwen3
from store.writing import write_store

QUICK = "--epochs 3 --batch-size 4 --gradient-accumulation-steps 2 --hidden-dim 32 --lr 1e-2 --text-lr 1e-3"
STEPS = 30  # 80 captions in batches of 8, three times
NOT_REPEATED = ("train/captions_per_second", "train/tokens_per_second", "train/memory_gb")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A store of 40 / 6 / 5 recordings with two captions each, and both kinds of text model."""
    folder = tmp_path_factory.mktemp("parts")
    header, splits = make_header(), make_splits((40, 6, 5))
    write_store(folder / "embeddings.h5", header, splits, make_vectors(header, splits))
    make_bert(folder / "bert")
    make_qwen3(folder / "qwen3")
    return folder


def arguments(parts, *words, model="qwen3", encoder="latent"):
    paths = ["--data-path", str(parts / "embeddings.h5"), "--text-model", str(parts / model), "--device", "cpu"]
    return ["--audio-encoder", encoder, *paths, *QUICK.split(), *words]


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory):
    """What a run leaves that nothing interrupted."""
    folder, before = tmp_path_factory.mktemp("whole"), os.getcwd()
    os.chdir(folder)
    try:
        train.main(arguments(parts))
    finally:
        os.chdir(before)
    return outcome(folder)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True, scope="module")
def every_step():
    """A TensorBoard point for each step, in the module's fixtures as well as in its tests."""
    before, train.LOG_EVERY = train.LOG_EVERY, 1
    yield
    train.LOG_EVERY = before


def outcome(folder):
    """Curves, the three checkpoints' weights and the test metrics of a run."""
    events = EventAccumulator(str(folder / "logs/tensorboard/latent"), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag not in NOT_REPEATED]
    curves = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    weights = {}
    for which in ("best_r1", "best_loss", "last"):
        contents = torch.load(folder / f"checkpoints/latent_{which}.pt", weights_only=True)
        for key in ("text_encoder_state_dict", "projection_state_dict"):
            weights |= {(which, name): value for name, value in contents[key].items()}
        weights |= {(which, key): torch.tensor(contents[key]) for key in ("epoch", "step")}
    summary = json.loads((folder / "checkpoints/training_summary.json").read_text())["latent"]
    return curves, weights, {key: value for key, value in summary.items() if key != "started"}


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(value, expected[1][name]) for name, value in found[1].items())
    assert found[2] == expected[2]


class Crash(Exception):
    pass


def crash_at(monkeypatch, step, where="train_step"):
    """Let the run fail when it comes to this step, or to what follows it."""
    original = getattr(train, where)

    def failing(run, *rest):
        if run.step == step:
            raise Crash
        return original(run, *rest)

    monkeypatch.setattr(train, where, failing)


def run_until_crash(parts, monkeypatch, step, *words, where="train_step"):
    with monkeypatch.context() as patch:
        crash_at(patch, step, where)
        with pytest.raises(Crash):
            train.main(arguments(parts, *words))
    time.sleep(1.0 - time.time() % 1)  # TensorBoard orders its files by the second


def log_text():
    return Path("train.log").read_text()
