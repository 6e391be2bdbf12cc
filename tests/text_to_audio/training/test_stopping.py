import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from common.errors import Stopped
from helpers.forked_script import ForkedScript
from helpers.interrupted_runs import (
    arguments,
    assert_same,
    every_step,  # noqa: F401
    log_text,
    outcome,
    parts,  # noqa: F401
    whole,  # noqa: F401
    workplace,  # noqa: F401
)

ROOT = Path(train.__file__).parent


def send(monkeypatch, number, where):
    """Let a signal come in the middle of `where`: during a step, a save, or in validation."""
    original, sent = getattr(train, where), []

    def interrupted(*rest):
        if not sent and rest[0].step >= 13:
            sent.append(os.kill(os.getpid(), number))
        return original(*rest)

    monkeypatch.setattr(train, where, interrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["train_step", "save_last", "measure_best"])
def test_a_signal_saves_and_leaves(parts, workplace, monkeypatch, whole, number, where):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        send(patch, number, where)
        with pytest.raises(Stopped) as raised:
            train.main(arguments(parts, "--save-every-steps", "5"))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert raised.value.signal_number == number
    text = str(raised.value)
    assert text.startswith(f"stopped by {number.name}; go on with: python train.py --audio-encoder latent ")
    assert text.endswith(" --resume auto")
    assert "\n" not in text
    step = torch.load("checkpoints/latent_last.pt", weights_only=True)["step"]
    assert step == {"train_step": 14, "save_last": 16, "measure_best": 30}[where]
    time.sleep(1.0 - time.time() % 1)
    train.main(arguments(parts, "--resume", "auto"))
    assert_same(outcome(workplace), whole)


def test_a_signal_in_validation_is_not_waited_out(parts, workplace, monkeypatch, whole):
    original, measured = train.Evaluator.measure, []

    def slow(self, *rest):
        measured.append(time.perf_counter())
        if len(measured) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        return original(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train.Evaluator, "measure", slow)
        with pytest.raises(Stopped):
            train.main(arguments(parts))
    assert time.perf_counter() - measured[1] < 10
    last = torch.load("checkpoints/latent_last.pt", weights_only=True)
    assert (last["step"], last["epoch"], last["progress"]["batches"]) == (20, 1, 10)
    time.sleep(1.0 - time.time() % 1)
    train.main(arguments(parts, "--resume", "auto"))
    assert_same(outcome(workplace), whole)


def start(parts, *words):
    """train.py as a process of its own, with a point per step."""
    code = (
        "import sys, train\nfrom common.errors import run_script\n"
        "train.LOG_EVERY = 1\nrun_script(lambda: train.main(sys.argv[1:]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments(parts, *words)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for_step(process, text):
    """Until the log has this text."""
    while process.poll() is None and (not Path("train.log").exists() or text not in log_text()):
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_script_leaves_with_the_signal_s_code(parts, workplace, number):
    process = start(parts, "--epochs", "10000", "--patience", "10000")
    wait_for_step(process, "epoch 2/")
    sent = time.perf_counter()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert time.perf_counter() - sent < 30
    assert process.returncode == 128 + number
    assert errors.splitlines()[-1].startswith(f"stopped by {number.name}; go on with: python train.py ")
    assert "Traceback" not in errors
    assert torch.load("checkpoints/latent_last.pt", weights_only=True)["step"] >= 20


@pytest.mark.slow
def test_killed_at_ten_random_instants(parts, tmp_path, whole):
    """kill -9 after the start-up, each time resumed; every run that comes to its end has lost nothing."""
    rng, killed, number, code = random.Random(time.time_ns()), 0, 0, 0
    words = arguments(parts, "--resume", "auto", "--save-every-steps", "2")
    with ForkedScript("train", LOG_EVERY=1) as script:
        while killed < 10 or code != 0:
            if code == 0:
                number += 1
                folder = tmp_path / str(number)
                folder.mkdir()
            log = folder / "train.log"
            starts = begun(log)
            script.start(folder, words)
            while script.running() and begun(log) == starts:
                time.sleep(0.01)
            if killed < 10:
                time.sleep(rng.uniform(0.0, 0.6))
                script.kill()
            code = script.wait()
            assert code in (-signal.SIGKILL, 0), (folder / "stderr.txt").read_text()
            killed += code != 0
            if code == 0:
                assert_same(outcome(folder), whole)


def begun(log):
    """How many runs in this log have come to their first step."""
    return log.read_text().count("validation: ") if log.exists() else 0
