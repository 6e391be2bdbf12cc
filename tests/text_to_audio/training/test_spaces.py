"""The family of audio spaces: share of the mean, bound of the deviation, spread and temperature."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import train
from helpers.interrupted_runs import QUICK
from helpers.stores import make_header, make_splits, make_vectors
from helpers.tiny_text_models import make_bert
from store.reading import EmbeddingStore
from store.writing import write_store
from text_to_audio.config import TrainingConfig
from text_to_audio.loading.vectors import AudioVectors
from text_to_audio.model.head import ProjectionHead
from text_to_audio.model.temperature import Temperature
from text_to_audio.training.spaces import build_projection, least_removed, measured_space, spread_of

DIMS = {"muq": 6, "latent": 4}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A store whose vectors all point the same way by and large, and a text model."""
    folder = tmp_path_factory.mktemp("parts")
    header, splits = make_header(dims=DIMS), make_splits((20, 6, 5))
    vectors = {key: values + 4 for key, values in make_vectors(header, splits).items()}
    write_store(folder / "embeddings.h5", header, splits, vectors)
    make_bert(folder / "bert")
    return folder


def arguments(parts, *words):
    paths = ["--data-path", str(parts / "embeddings.h5"), "--text-model", str(parts / "bert"), "--device", "cpu"]
    return ["--audio-encoder", "latent", "muq", *paths, *QUICK.split(), *words]


@pytest.mark.parametrize("floor", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("removed", [0.0, 0.5, 1.0])
def test_the_family_in_float64(removed, floor):
    rng = np.random.default_rng(0)
    mean, std, audio = rng.normal(size=8), rng.uniform(0.01, 2, 8), rng.normal(size=(4, 8))
    std[3] = 0
    for mode, divisor in (("zscore", np.maximum(std, floor * np.sqrt(np.mean(std**2)))), ("centre", np.ones(8))):
        head = ProjectionHead(3, 4, 8)
        head.set_statistics(mean, std, mode, removed, floor)
        right = (audio - removed * mean) / divisor
        right /= np.linalg.norm(right, axis=1, keepdims=True)
        np.testing.assert_allclose(head.standardise_audio(torch.from_numpy(audio)).numpy(), right, atol=1e-6)
        assert head.standardises == bool(np.ptp(divisor) > 0 or removed > 0)
    head.set_statistics(mean, std, "none", removed, floor)
    assert not head.standardises


@pytest.mark.parametrize("removed", [1.0, 0.5, -1.0])
@pytest.mark.parametrize("mode", ["zscore", "centre", "none"])
def test_the_spread_is_that_of_the_unit_vectors(parts, mode, removed):
    store = EmbeddingStore(parts / "embeddings.h5")
    asked = TrainingConfig("muq", text_dim=3, audio_dim=6, standardise=mode, mean_removed=removed, device="cpu")
    config = measured_space(asked, store, AudioVectors(store, "train", "muq"))
    assert config.mean_removed == (0.0 if mode == "none" else removed) or (removed < 0 < config.mean_removed < 1)
    head = build_projection(config, store)
    rows = (np.asarray(store.vectors("train", "muq"), np.float64) - head.mean.numpy()) / head.std.numpy()
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert config.spread == pytest.approx(math.sqrt(1 - np.linalg.norm(unit.mean(0)) ** 2), rel=1e-5)
    assert {1.0: config.spread > 0.95, 0.5: True, -1.0: 0.9 <= config.spread < 0.95}[removed] or mode == "none"


def test_as_little_of_the_mean_as_leaves_a_spread():
    rng = np.random.default_rng(0)
    vectors = torch.from_numpy(rng.normal(size=(50, 8)) + 3)
    mean = vectors.mean(0)
    removed = least_removed(vectors, mean, 0.9)
    assert spread_of(vectors, mean, removed - 0.01) < 0.9 <= spread_of(vectors, mean, removed)
    assert least_removed(vectors, mean, 0.1) == 0.0  # they have it as they are
    assert spread_of(torch.ones(3, 1), torch.zeros(1)) == 0.01  # parallel vectors have no temperature of 0


def test_each_space_of_a_run_has_its_own_temperature(parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = arguments(parts, "--standardise", "none", "--temperature", "0.05")
    train.main(words)
    summary, spreads = json.loads(Path("checkpoints/training_summary.json").read_text()), set()
    for name in DIMS:
        contents = torch.load(f"checkpoints/{name}_best_r1.pt", weights_only=True)
        config = TrainingConfig(**contents["config"])
        spreads.add(config.spread)
        assert config.spread < 0.5
        assert math.exp(contents["log_temperature"]) == pytest.approx(0.05 * config.spread, rel=1e-6)
        evaluated = evaluate.main(["--checkpoint", f"checkpoints/{name}_best_r1.pt", "--device", "cpu"])
        assert evaluated["loss"] == pytest.approx(summary[name]["loss"], abs=0.01)
        validated = evaluate.main(["--checkpoint", f"checkpoints/{name}_best_r1.pt", "--split", "val"])
        assert validated["loss"] == pytest.approx(contents["metrics"]["loss"], rel=1e-5)
    assert len(spreads) == 2
    train.main([*words, "--epochs", "4", "--resume", "auto"])  # with the spread that it began with
    state = torch.load("checkpoints/joint_last.pt", weights_only=True)["spaces"]
    assert {each["measured"]["spread"] for each in state.values()} == spreads


def test_the_bounds_of_a_learnt_temperature_follow_the_spread():
    for start, end in ((1e-6, 0.01 * 0.3), (50.0, 0.3)):
        temperature = Temperature(0.07, True, spread=0.3)
        assert temperature().item() == pytest.approx(0.07 * 0.3)
        with torch.no_grad():
            temperature.log.fill_(math.log(start))
        temperature.keep_in_range()
        assert temperature().item() == pytest.approx(end)


def test_a_config_from_before_reads_as_the_code_then_did():
    values = asdict(TrainingConfig("muq"))
    for name in ("mean_removed", "std_floor", "spread"):
        del values[name]
    config = TrainingConfig.from_dict(values, "a checkpoint")
    assert (config.mean_removed, config.std_floor, config.scaled_temperature) == (1.0, 0.0, 0.07)
