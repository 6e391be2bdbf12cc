import logging
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from common.errors import UserError
from helpers.interrupted_runs import (
    STEPS,
    Crash,
    arguments,
    assert_same,
    crash_at,
    every_step,  # noqa: F401
    log_text,
    outcome,
    parts,  # noqa: F401
    run_until_crash,
    whole,  # noqa: F401
    workplace,  # noqa: F401
)
from helpers.stores import make_header, make_splits, make_vectors
from store.writing import write_store
from text_to_audio.measuring.curves import read_curves
from text_to_audio.training.resuming import resume_command

ROOT = Path(train.__file__).parent


@pytest.mark.parametrize("crashes", [(0,), (7,), (10,), (11, 23), (12, 14, 29), (20, 20)])
def test_resumed_equals_uninterrupted(parts, workplace, monkeypatch, whole, crashes):
    for step in crashes:
        run_until_crash(parts, monkeypatch, step, "--resume", "auto", "--save-every-steps", "3")
    train.main(arguments(parts, "--resume", "auto"))
    assert_same(outcome(workplace), whole)
    curve = [step for step, _ in whole[0]["train/loss"]]
    assert curve == list(range(1, STEPS + 1))
    assert [step for step, _ in whole[0]["val/loss"]] == [10, 20, 30]


@pytest.mark.parametrize("where", ["save_epoch", "save_last", "measure_best"])
def test_a_crash_after_the_last_step_of_an_epoch(parts, workplace, monkeypatch, whole, where, caplog):
    step = STEPS if where == "measure_best" else 20
    run_until_crash(parts, monkeypatch, step, "--save-every-steps", "20" if where == "save_epoch" else "0", where=where)
    caplog.clear()
    with caplog.at_level(logging.INFO, "tensorboard"):
        train.main(arguments(parts, "--resume", "checkpoints/latent_last.pt"))
    assert "urging" not in caplog.text  # TensorBoard's line on points that are hidden
    assert_same(outcome(workplace), whole)


@pytest.mark.parametrize(
    "words",
    [
        ["--learn-temperature", "--caption-dropout", "0.3"],
        ["--text-negatives", "batch", "--audio-negatives", "bank"],
    ],
)
def test_settings_with_states_of_their_own(parts, workplace, monkeypatch, words):
    train.main(arguments(parts, *words, "--checkpoint-dir", "a", model="bert"))
    first = torch.load("a/latent_last.pt", weights_only=True)
    with monkeypatch.context() as patch:
        crash_at(patch, 13)
        with pytest.raises(Crash):
            train.main(arguments(parts, *words, "--save-every-steps", "4", model="bert"))
    train.main(arguments(parts, *words, "--resume", "auto", model="bert"))
    second = torch.load("checkpoints/latent_last.pt", weights_only=True)
    for key in ("text_encoder_state_dict", "projection_state_dict"):
        assert all(torch.equal(value, second[key][name]) for name, value in first[key].items())
    assert first["log_temperature"] == second["log_temperature"]
    assert first["metrics"] == second["metrics"]


@pytest.mark.parametrize("damage", ["cut", "gone", "empty"])
def test_a_damaged_last_checkpoint(parts, workplace, monkeypatch, whole, damage):
    run_until_crash(parts, monkeypatch, 14, "--save-every-steps", "4")
    last, previous = Path("checkpoints/latent_last.pt"), Path("checkpoints/latent_last.prev.pt")
    steps = [torch.load(path, weights_only=True)["step"] for path in (last, previous)]
    assert steps == [12, 10]
    if damage == "gone":
        last.unlink()
    else:
        last.write_bytes(last.read_bytes()[: -5000 if damage == "cut" else 0])
    kept = previous.read_bytes()
    run_until_crash(parts, monkeypatch, 12, "--resume", "auto", "--save-every-steps", "11")
    (line,) = [line for line in log_text().splitlines() if "going on from" in line]
    assert line.endswith("; going on from checkpoints/latent_last.prev.pt")
    assert "latent_last.pt: " in line
    assert "going on after step 10 of 30, 1 of 3 epochs done" in log_text()
    assert previous.read_bytes() == kept  # the damaged file has not taken its place
    assert torch.load(last, weights_only=True)["step"] == 11
    train.main(arguments(parts, "--resume", "auto"))
    assert_same(outcome(workplace), whole)


def test_both_are_damaged(parts, workplace, monkeypatch):
    run_until_crash(parts, monkeypatch, 9, "--save-every-steps", "4")
    for name in ("latent_last.pt", "latent_last.prev.pt"):
        path = Path("checkpoints", name)
        path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"latent_last\.pt: .*cannot load.*latent_last\.prev\.pt: .*cannot") as raised:
        train.main(arguments(parts, "--resume", "auto"))
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def halfway(parts, tmp_path_factory):
    """The folder of a run that ended after 12 of 30 steps."""
    folder, before = tmp_path_factory.mktemp("halfway"), os.getcwd()
    os.chdir(folder)
    patch = pytest.MonkeyPatch()
    try:
        run_until_crash(parts, patch, 14, "--save-every-steps", "6")
    finally:
        os.chdir(before)
    return folder


def test_what_must_not_change(parts, halfway, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for path in (halfway / "checkpoints").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    resume = ["--resume", str(folder / "latent_last.pt")]
    header, splits = make_header(dims={"latent": 5}), make_splits((40, 6, 5))
    write_store("wider.h5", header, splits, make_vectors(header, splits))
    header = make_header()
    write_store("other_vectors.h5", header, splits, make_vectors(header, splits, seed=1))
    splits["train"].caption[7] = "another caption"
    write_store("other_captions.h5", header, splits, make_vectors(header, splits))
    other_data = "cannot go on with other data: other_"
    cases = {
        "audio_encoder was 'latent' and is 'muq'": arguments(parts, encoder="muq"),
        "hidden_dim was 32 and is 16": arguments(parts, "--hidden-dim", "16"),
        r"batch_size was 4 and is 8; lr was 0\.01 and is 0\.5; seed was 42 and is 1$": arguments(
            parts, "--seed", "1", "--lr", "0.5", "--batch-size", "8"
        ),
        "audio_negatives was 'batch' and is 'micro'": arguments(parts, "--audio-negatives", "micro"),
        "text_model was .*qwen3' and is .*bert'": arguments(parts, model="bert"),
        r"another audio space than wider\.h5 has: dim was 4 and is 5": arguments(parts, "--data-path", "wider.h5"),
        f"{other_data}vectors.h5": arguments(parts, "--data-path", "other_vectors.h5"),
        f"{other_data}captions.h5": arguments(parts, "--data-path", "other_captions.h5"),
        r"best_r1\.pt, which is missing": arguments(parts, "--checkpoint-dir", "elsewhere"),
        r"gone\.pt: no such file": arguments(parts, "--resume", "gone.pt"),
        "expected a checkpoint to go on from": arguments(parts, "--resume", str(folder / "latent_best_r1.pt")),
    }
    for pattern, words in cases.items():
        with pytest.raises(UserError, match=pattern) as raised:
            train.main(words if "--resume" in words else [*words, *resume])
        assert "\n" not in str(raised.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not Path("logs/tensorboard/latent").exists()


def test_more_epochs_and_a_finished_run(parts, workplace, whole, monkeypatch):
    train.main(arguments(parts))
    time.sleep(1.0 - time.time() % 1)
    before = {path: path.stat().st_mtime_ns for path in Path(".").rglob("*") if path.is_file()}
    monkeypatch.setattr(train, "prepare", None)  # nothing is loaded
    train.main(arguments(parts, "--resume", "auto"))
    assert "this run is finished after epoch 3, best epoch" in log_text()
    after = {path: path.stat().st_mtime_ns for path in Path(".").rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before.get(path)} == {Path("train.log")}
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    train.main(arguments(parts, "--resume", "auto", "--epochs", "4", "--patience", "9"))
    assert "warning: the run began with --epochs 3; with 4 the learning rate" in log_text()
    last = torch.load("checkpoints/latent_last.pt", weights_only=True)
    assert (last["epoch"], last["step"]) == (4, 40)
    rates = [value for _, value in outcome(workplace)[0]["learning_rate/head"]]
    assert rates[-1] > 0
    assert last["schedule_state_dict"]["_last_lr"][0] == pytest.approx(0, abs=1e-9)


def test_a_finished_run_without_its_test_metrics_is_tested(parts, workplace, monkeypatch, whole):
    run_until_crash(parts, monkeypatch, STEPS, where="measure_best")
    Path("checkpoints/training_summary.json").write_text('{"latent": {"epoch": 1, "t2a_R@1": 99.0}}')
    monkeypatch.setattr(train, "train_step", None)  # nothing is trained
    train.main(arguments(parts, "--resume", "auto"))
    assert_same(outcome(workplace), whole)


def test_auto_without_a_checkpoint_is_a_fresh_run(parts, workplace, whole):
    train.main(arguments(parts, "--resume", "auto"))
    assert "--resume auto: no checkpoints/latent_last.pt, so this is a fresh run" in log_text()
    assert_same(outcome(workplace), whole)


def test_a_fresh_run_puts_an_unfinished_one_aside(parts, workplace, monkeypatch, whole):
    run_until_crash(parts, monkeypatch, 14, "--save-every-steps", "4")
    run_until_crash(parts, monkeypatch, 5, "--save-every-steps", "4", "--seed", "7")
    line = next(line for line in log_text().splitlines() if "these" in line or "this is a fresh run" in line)
    aside = "checkpoints/latent_unfinished_1"
    assert f"the checkpoints of an unfinished one (step 12) are now in {aside}; to go on with that: " in line
    assert not Path("checkpoints/latent_last.prev.pt").exists()
    words = shlex.split(line.split("to go on with that: ")[1])
    assert words[:2] == ["python", "train.py"]
    train.main(words[2:])
    own = read_curves(Path("logs/tensorboard/latent_unfinished_1/latent"))  # the curves went with it
    assert own["train/loss"] == whole[0]["train/loss"]
    curves, weights = whole[:2]
    last = torch.load(f"{aside}/latent_last.pt", weights_only=True)
    assert torch.equal(last["projection_state_dict"]["mean"], weights["last", "mean"])
    for name, value in last["text_encoder_state_dict"].items():
        assert torch.equal(value, weights["last", name])
    assert last["metrics"]["loss"] == pytest.approx(curves["val/loss"][-1][1])


def test_a_fresh_run_over_something_that_cannot_be_read(parts, workplace):
    Path("checkpoints").mkdir()
    Path("checkpoints/latent_last.pt").write_text("mine")
    train.main(arguments(parts, "--epochs", "1"))
    assert "this is a fresh run, and what was there is now in checkpoints/latent_unfinished_1" in log_text()
    assert Path("checkpoints/latent_unfinished_1/latent_last.pt").read_text() == "mine"


def test_the_command_that_goes_on_means_the_same_settings(parts):
    words = arguments(parts, "--instruction", "", "--temperature", "0.05", "--learn-temperature", "--patience", "2")
    config = train.config_from_arguments(train.build_parser().parse_args(words))
    again = shlex.split(resume_command(config))[2:]
    found = train.config_from_arguments(train.build_parser().parse_args(again))
    assert found.resume == "auto"
    assert found.as_dict() == config.as_dict()
    assert "--epochs" in again
    assert "--max-length" not in again


def test_a_full_disk_leaves_both_checkpoints(parts, workplace, monkeypatch):
    run_until_crash(parts, monkeypatch, 9, "--save-every-steps", "4")
    before = {path.name: path.read_bytes() for path in Path("checkpoints").iterdir()}
    code = (
        "import resource, sys, train\n"
        "from common.errors import run_script\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        "run_script(lambda: train.main(sys.argv[1:]))"
    )
    words = arguments(parts, "--resume", "auto", "--save-every-steps", "1")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: checkpoints/latent_last.pt: could not write the checkpoint (File too large); the")
    assert {path.name: path.read_bytes() for path in Path("checkpoints").iterdir()} == before
