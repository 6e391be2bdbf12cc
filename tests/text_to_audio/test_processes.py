"""Training by several processes (torch.distributed with gloo): the same numbers as one, and one writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from common.errors import UserError
from helpers.stores import make_header, make_splits, make_vectors
from helpers.tiny_text_models import make_bert
from store.writing import write_store
from text_to_audio.processes import ALONE, Processes, join

ROOT = Path(train.__file__).parent
SIZES = "--batch-size 3 --gradient-accumulation-steps 4 --hidden-dim 16 --lora-dropout 0.1 --head-dropout 0.1"
CASES = {
    "batch": (["--audio-negatives", "batch"], ["muq"]),
    "bank": (["--audio-negatives", "bank", "--text-negatives", "batch"], ["muq"]),
    "joint": (["--text-negatives", "batch", "--text-queue", "20", "--learn-temperature"], ["muq", "latent"]),
}
# Every case in one process, as it takes longer to start than to make five steps.
FIVE_STEPS = """
import json, sys, torch, train
from text_to_audio.loss.bank import build_bank
from text_to_audio.loading.batches import plan_epoch
from common.logs import start_log
from text_to_audio.processes import join

def five_steps(config, processes, path):
    run = train.prepare(config, start_log("train", "train.log", quiet=not processes.is_main), None, processes)
    for module in run.modules():
        module.double().train()
    for space in run.spaces:
        if space.bank:
            space.bank = build_bank(space.config, run.store, space.vectors, space.projection)
    start = {name: value.clone() for module in run.modules() for name, value in module.state_dict().items()}
    losses = []
    for batch in plan_epoch(run.captions.caption_source, config.effective_batch_size, config.seed, 1)[:5]:
        losses.append(train.train_step(run, run.reader.read(run.step, batch)))
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.step += 1
    found = {name: value for module in run.modules() for name, value in module.state_dict().items()}
    if processes.is_main:
        torch.save({"start": start, "end": found, "losses": torch.stack(losses)}, path)
    else:
        torch.save(found, path + ".other")

torch.set_default_dtype(torch.float64)
parser, processes = train.build_parser(), None
for name, words in json.loads(sys.argv[2]).items():
    config = train.config_from_arguments(parser.parse_args(words))
    processes = processes or join(config)
    five_steps(config, processes, f"{name}.{sys.argv[1]}.pt")
processes.leave()
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    header, splits = make_header(dims={"muq": 6, "latent": 4}), make_splits((40, 6, 5))
    splits["train"].source_id = [f"source-{row // 2}" for row in range(40)]
    splits["train"].caption = [f"{'calm happy piano ' * (i % 5)}song {i}. A slow drum." for i in range(80)]
    write_store(folder / "embeddings.h5", header, splits, make_vectors(header, splits))
    make_bert(folder / "bert")
    (folder / "five_steps.py").write_text(FIVE_STEPS)
    return folder


def arguments(parts, *words, encoders=("muq",)):
    paths = ["--data-path", str(parts / "embeddings.h5"), "--text-model", str(parts / "bert"), "--device", "cpu"]
    return ["--audio-encoder", *encoders, *paths, *SIZES.split(), *words]


def launch(processes, folder, script, *words, check=True):
    """Run a script by torchrun (by Python alone for one process) in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    by = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *by, str(script), *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=check)


@pytest.fixture(scope="module")
def five_steps(parts, tmp_path_factory):
    """Where every case has gone five steps by one process and by two."""
    folder = tmp_path_factory.mktemp("five_steps")
    more = ["--lr", "1e-3", "--text-lr", "1e-3"]
    cases = {name: arguments(parts, *words, *more, encoders=encoders) for name, (words, encoders) in CASES.items()}
    for processes in (1, 2):
        launch(processes, folder, parts / "five_steps.py", str(processes), json.dumps(cases))
    return folder


@pytest.mark.parametrize("case", list(CASES))
def test_two_processes_go_where_one_goes(five_steps, case):
    one, two = (torch.load(five_steps / f"{case}.{processes}.pt", weights_only=True) for processes in (1, 2))
    travelled = torch.cat([(one["end"][name] - one["start"][name]).double().flatten() for name in one["end"]]).norm()
    apart = torch.cat([(one["end"][name] - two["end"][name]).double().flatten() for name in one["end"]]).norm()
    assert travelled > 1e-2
    assert apart <= 1e-4 * travelled
    torch.testing.assert_close(one["losses"], two["losses"], rtol=1e-9, atol=0)
    other = torch.load(five_steps / f"{case}.2.pt.other", weights_only=True)
    assert all(torch.equal(value, two["end"][name]) for name, value in other.items())  # they do not drift apart


def test_a_whole_run_by_two_processes(parts, tmp_path, monkeypatch):
    words = arguments(parts, "--epochs", "2", "--lr", "1e-3", "--text-lr", "1e-3", "--save-every-steps", "3")
    folders = {processes: tmp_path / str(processes) for processes in (1, 2)}
    for folder in folders.values():
        folder.mkdir()
    monkeypatch.chdir(folders[1])
    train.main(words)
    launch(2, folders[2], ROOT / "train.py", *words)
    names = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in folders.values()]
    assert names[0] == names[1]
    one, two = (torch.load(folder / "checkpoints/muq_last.pt", weights_only=True) for folder in folders.values())
    assert one["step"] == two["step"]
    assert one["metrics"]["loss"] == pytest.approx(two["metrics"]["loss"], rel=1e-4)
    log = (folders[2] / "train.log").read_text()
    assert log.count("epoch 2/2: ") == 1
    assert "2 processes on cpu" in log
    assert len(list((folders[2] / "logs/tensorboard/muq").iterdir())) == 1
    again = launch(2, folders[2], ROOT / "train.py", *words, "--resume", "auto")
    assert "this run is finished" in again.stdout


def test_passes_that_cannot_be_shared(parts, tmp_path):
    words = arguments(parts, "--gradient-accumulation-steps", "3")
    done = launch(2, tmp_path, ROOT / "train.py", *words, check=False)
    assert done.returncode != 0
    assert "error: expected gradient_accumulation_steps to be a multiple of the 2 processes" in done.stderr
    assert not (tmp_path / "checkpoints").exists()


def test_shares_are_even_in_number_and_size():
    shares = [Processes(number, 3).own(range(12)) for number in range(3)]
    assert sorted(each for share in shares for each in share) == list(range(12))
    assert [len(share) for share in shares] == [4, 4, 4]
    assert np.ptp([sum(share) for share in shares]) == 0
    assert Processes(2, 3).own(range(2)) == []


def test_one_process_sums_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join(train.TrainingConfig("muq", gradient_accumulation_steps=7)) is ALONE
    tensor = torch.ones(3)
    ALONE.sum([tensor])
    assert tensor.tolist() == [1, 1, 1]
    assert not ALONE.any(False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="multiple of the 2 processes, which share its passes, found 7"):
        join(train.TrainingConfig("muq", gradient_accumulation_steps=7, device="cpu"))
