"""A fresh run over earlier ones: what they left is moved aside whole, and can be used."""

import json
from pathlib import Path

import pytest
import torch

import evaluate
import train
from common.errors import UserError
from helpers.interrupted_runs import QUICK
from helpers.stores import make_header, make_splits, make_vectors
from helpers.tiny_text_models import make_bert
from store.writing import write_store
from text_to_audio.measuring.curves import read_curves
from text_to_audio.measuring.summary import main as print_summary
from text_to_audio.model.inference import load_checkpoint

CHECKPOINTS = Path("checkpoints")
LOGS = Path("logs/tensorboard")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    header, splits = make_header(dims={"muq": 6, "latent": 4}), make_splits((20, 6, 5))
    write_store(folder / "embeddings.h5", header, splits, make_vectors(header, splits))
    make_bert(folder / "bert")
    return folder


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(parts, *encoders, seed=1, words=()):
    paths = ["--data-path", str(parts / "embeddings.h5"), "--text-model", str(parts / "bert"), "--device", "cpu"]
    train.main(["--audio-encoder", *encoders, *paths, *QUICK.split(), "--epochs", "1", "--seed", str(seed), *words])


def seed_of(folder, name):
    """The seed of a checkpoint, which is loaded for use and measured."""
    path = Path(folder, f"{name}_best_r1.pt")
    load_checkpoint(path, "cpu")
    return torch.load(path, weights_only=True)["config"]["seed"]


def summary(folder=CHECKPOINTS):
    return json.loads(Path(folder, "training_summary.json").read_text())


def test_a_run_over_a_finished_run(parts, capsys):
    run(parts, "muq", seed=1)
    first, curves = summary()["muq"], read_curves(LOGS / "muq")
    capsys.readouterr()
    run(parts, "muq", seed=2)
    aside, printed = CHECKPOINTS / "muq_finished_1", capsys.readouterr()
    renamed = f"muq ({first['started'][:16].replace('T', ' ')})"
    said = f"left is now in {aside}, its curves in {LOGS}/muq_finished_1, its test metrics in {CHECKPOINTS}/training_"
    assert printed.out.count("this is a fresh run") == 1
    assert f'{said}summary.json under "{renamed}"\n' in printed.out
    assert "purge" not in (printed.out + printed.err).lower()
    assert (seed_of(CHECKPOINTS, "muq"), seed_of(aside, "muq")) == (2, 1)
    assert read_curves(LOGS / "muq_finished_1/muq") == curves
    assert len(read_curves(LOGS / "muq")["val/loss"]) == 1
    assert summary()[renamed] == first
    assert summary()["muq"]["started"] != first["started"]
    assert summary(aside) == {"muq": first}  # for the model card, and to go on with it
    assert (aside / "muq_report.html").exists()
    for folder, of_run in ((CHECKPOINTS, summary()["muq"]), (aside, first)):
        found = evaluate.main(["--checkpoint", f"{folder}/muq_best_r1.pt", "--device", "cpu"])
        assert found["t2a_MRR"] == pytest.approx(of_run["t2a_MRR"], abs=1e-4)
    capsys.readouterr()
    print_summary(["checkpoints"])
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines[1:]}) == 1
    assert any(line.startswith(renamed + "  ") for line in lines)
    run(parts, "muq", seed=1, words=["--checkpoint-dir", str(aside), "--resume", "auto"])
    assert "this run is finished after epoch 1" in capsys.readouterr().out
    run(parts, "muq", seed=3)  # within a minute, so the summary needs the seconds too
    assert len(summary()) == 3
    assert (seed_of(CHECKPOINTS / "muq_finished_2", "muq"), seed_of(CHECKPOINTS, "muq")) == (2, 3)


def test_a_joint_run_and_its_spaces(parts, capsys):
    run(parts, "latent", "muq", seed=1)
    run(parts, "muq", seed=2)  # only what it writes over: the joint run's latent stays in use
    aside = CHECKPOINTS / "joint_finished_1"
    assert {path.name for path in aside.iterdir()} >= {"muq_best_r1.pt", "muq_last.pt", "training_summary.json"}
    assert (seed_of(aside, "muq"), seed_of(CHECKPOINTS, "muq"), seed_of(CHECKPOINTS, "latent")) == (1, 2, 1)
    assert (LOGS / "latent").is_dir()
    run(parts, "latent", "muq", seed=3)  # now a joint run's latent and a single run's muq
    assert seed_of(CHECKPOINTS / "joint_finished_2", "latent") == 1
    assert (CHECKPOINTS / "joint_finished_2/joint_last.pt").exists()
    assert seed_of(CHECKPOINTS / "muq_finished_1", "muq") == 2
    assert (seed_of(CHECKPOINTS, "latent"), seed_of(CHECKPOINTS, "muq")) == (3, 3)
    assert sorted(name.split()[0] for name in summary()) == ["latent", "latent", "muq", "muq", "muq"]
    for path in sorted(CHECKPOINTS.glob("*_finished_*")):
        assert summary(path).keys() == {each.name.removesuffix("_best_r1.pt") for each in path.glob("*_best_r1.pt")}
    assert Path("logs/tensorboard/joint_finished_2/latent").is_dir()


def test_a_best_checkpoint_alone_and_the_curves_of_another_folder(parts, capsys):
    run(parts, "muq", seed=1)
    for path in CHECKPOINTS.glob("muq_*last*"):
        path.unlink()
    run(parts, "muq", seed=2, words=["--checkpoint-dir", "other"])
    assert f"the curves of another run in {LOGS}/muq are now in {LOGS}/muq_earlier_1" in capsys.readouterr().out
    run(parts, "muq", seed=3, words=["--log-dir", "more"])
    assert (seed_of(CHECKPOINTS / "muq_finished_1", "muq"), seed_of("other", "muq")) == (1, 2)
    assert (LOGS / "muq").is_dir()  # of the run in `other`


def test_nothing_is_moved_where_the_summary_is_none(parts):
    run(parts, "muq")
    (CHECKPOINTS / "training_summary.json").write_text("{")
    before = sorted(CHECKPOINTS.rglob("*"))
    with pytest.raises(UserError, match=r"checkpoints/training_summary\.json: expected JSON"):
        run(parts, "muq")
    assert sorted(CHECKPOINTS.rglob("*")) == before
