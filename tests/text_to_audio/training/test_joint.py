"""One run for several audio spaces: what it leaves, that it learns each, and that it is never lost."""

import json
import os
from pathlib import Path

import pytest
import torch

import evaluate
import train
from common.errors import UserError
from helpers.interrupted_runs import QUICK, Crash, crash_at
from helpers.stores import make_header, make_splits, make_vectors
from helpers.tiny_text_models import make_bert
from store.writing import write_store
from text_to_audio.model.inference import load_checkpoint

KEYS = ("text_encoder_state_dict", "projection_state_dict")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    header, splits = make_header(dims={"muq": 6, "latent": 4, "mert": 9}), make_splits((20, 6, 5))
    write_store(folder / "embeddings.h5", header, splits, make_vectors(header, splits))
    make_bert(folder / "bert")
    return folder


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arguments(parts, *words, encoders=("latent", "muq")):
    paths = ["--data-path", str(parts / "embeddings.h5"), "--text-model", str(parts / "bert"), "--device", "cpu"]
    return ["--audio-encoder", *encoders, *paths, *QUICK.split(), *words]


def same_weights(one, other):
    one, other = (torch.load(path, weights_only=True) for path in (one, other))
    return all(torch.equal(value, other[key][name]) for key in KEYS for name, value in one[key].items())


def test_each_space_has_the_files_of_a_run_of_its_own(parts, workplace):
    train.main(arguments(parts, encoders=("latent", "muq", "mert")))
    names = {path.name for path in Path("checkpoints").iterdir()}
    for name, dim in (("latent", 4), ("muq", 6), ("mert", 9)):
        assert {f"{name}_{which}" for which in ("best_r1.pt", "best_loss.pt", "last.pt", "report.html")} <= names
        contents = torch.load(f"checkpoints/{name}_best_r1.pt", weights_only=True)
        assert (contents["config"]["audio_encoder"], contents["config"]["audio_dim"]) == (name, dim)
        encoder, head, _ = load_checkpoint(f"checkpoints/{name}_best_r1.pt", "cpu")
        assert head(encoder(["a calm song"]), torch.zeros(1, dim))[0].shape == (1, dim)
        again = evaluate.main(["--checkpoint", f"checkpoints/{name}_best_r1.pt", "--device", "cpu"])
        summary = json.loads(Path("checkpoints/training_summary.json").read_text())[name]
        assert again["t2a_MRR"] == pytest.approx(summary["t2a_MRR"], abs=1e-4)
        assert Path(f"logs/tensorboard/{name}").is_dir()
    assert {"joint_last.pt", "joint_last.prev.pt"} <= names
    assert_each_is_kept_by_its_own_validation()
    with pytest.raises(UserError, match=r"joint_last\.pt: expected the checkpoint of one audio space, such as latent_"):
        load_checkpoint("checkpoints/joint_last.pt", "cpu")


def assert_each_is_kept_by_its_own_validation():
    log, states = Path("train.log").read_text(), torch.load("checkpoints/joint_last.pt", weights_only=True)
    for name, space in states["spaces"].items():
        best, contents = space["best"], torch.load(f"checkpoints/{name}_best_r1.pt", weights_only=True)
        assert best["r1"] == [contents["metrics"]["t2a_R@1"], contents["metrics"]["t2a_MRR"]]
        assert best["r1_epoch"] == contents["epoch"]
        rates = [100 * hits.double().mean().item() for hits in best["hits"]]
        assert (rates[contents["epoch"] - 1], best["mrr"][contents["epoch"] - 1]) == tuple(best["r1"])
        assert f"R@1 {best['r1'][0]:.1f}, MRR {best['r1'][1]:.2f}" in log
    curves = [space["best"]["mrr"] for space in states["spaces"].values()]
    assert len({tuple(curve) for curve in curves}) == len(curves)


def test_with_one_space_more_the_first_head_learns_as_fast(parts, workplace):
    train.main(arguments(parts, "--text-lr", "0", "--head-dropout", "0", "--checkpoint-dir", "both"))
    train.main(
        arguments(parts, "--text-lr", "0", "--head-dropout", "0", "--checkpoint-dir", "one", encoders=["latent"])
    )
    both, one = (torch.load(f"{folder}/latent_last.pt", weights_only=True) for folder in ("both", "one"))
    for name, value in one["projection_state_dict"].items():  # a frozen text encoder gives the heads the same to learn
        torch.testing.assert_close(value, both["projection_state_dict"][name], atol=2e-5, rtol=1e-3)
    assert both["metrics"]["loss"] == pytest.approx(one["metrics"]["loss"], rel=1e-4)


def crash_at_step_8(monkeypatch, words):
    with monkeypatch.context() as patch:
        crash_at(patch, 8)
        with pytest.raises(Crash):
            train.main(words)


@pytest.mark.parametrize("words", [[], ["--text-negatives", "batch", "--audio-negatives", "bank", "--text-queue", "9"]])
def test_it_goes_on_to_the_same_numbers(parts, workplace, monkeypatch, words):
    train.main(arguments(parts, *words, "--checkpoint-dir", "whole"))
    crash_at_step_8(monkeypatch, arguments(parts, *words, "--save-every-steps", "3"))
    train.main(arguments(parts, *words, "--resume", "auto"))
    for name in ("latent", "muq"):
        for which in ("best_r1", "best_loss", "last"):
            assert same_weights(f"checkpoints/{name}_{which}.pt", f"whole/{name}_{which}.pt")
    before = os.stat("checkpoints/joint_last.pt").st_mtime_ns
    train.main(arguments(parts, *words, "--resume", "auto"))
    assert "this run is finished" in Path("train.log").read_text()
    assert os.stat("checkpoints/joint_last.pt").st_mtime_ns == before


def test_an_unfinished_joint_run_is_put_aside_by_a_run_of_one_of_its_spaces(parts, workplace, monkeypatch):
    crash_at_step_8(monkeypatch, arguments(parts))
    train.main(arguments(parts, encoders=["muq"]))
    aside = {path.name for path in Path("checkpoints/joint_unfinished_1").iterdir()}
    assert {"joint_last.pt", "latent_best_r1.pt", "muq_best_r1.pt"} <= aside
    log = Path("train.log").read_text()
    assert "--audio-encoder latent muq" in log
    assert log.count("this is a fresh run") == 1
    Path("checkpoints/joint_last.pt").write_bytes(Path("checkpoints/joint_unfinished_1/joint_last.pt").read_bytes())
    Path("checkpoints/latent_best_r1.pt").write_bytes(
        Path("checkpoints/joint_unfinished_1/latent_best_r1.pt").read_bytes()
    )
    with pytest.raises(
        UserError, match=r"needs its best checkpoint checkpoints/muq_best_r1\.pt, which is another run's"
    ):
        train.main(arguments(parts, "--resume", "auto"))


def test_a_name_twice(parts, workplace):
    with pytest.raises(UserError, match="expected each audio_encoder once, found muq more than once"):
        train.main(arguments(parts, encoders=["muq", "latent", "muq"]))
