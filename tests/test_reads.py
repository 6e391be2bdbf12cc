"""How often each command opens a checkpoint and the store: MERT's head alone is 315 MB, a split's strings take seconds.

The commands run in this process on what tests/data/written_by_1a63506 holds.
"""

import builtins
import collections
import os
import shutil
from pathlib import Path

import h5py
import pytest
import torch

import evaluate
import export
import index_library
import search
import train
from text_to_audio.measuring import report_page

WRITTEN = Path(__file__).parent / "data/written_by_1a63506"
STORE = "data/musicbench_embeddings/embeddings.h5"
LIBRARY = ["--milvus-uri", "library.db", "--device", "cpu"]
TRAIN = (
    f"--device cpu --text-model models/text --data-path {STORE} --batch-size 4 --gradient-accumulation-steps 2 "
    "--hidden-dim 16 --lora-rank 2 --max-length 32 --lr 1e-2 --text-lr 1e-3 --warmup-steps 2 --save-every-steps 2"
).split()
OPENED, SPLITS = 2, 3  # the header and where the vectors lie; then the strings of each split


class Reads:
    """Counts by path. whole, mapped: checkpoints whose tensors are read, and are left in the file. store: by HDF5."""

    def __init__(self, monkeypatch):
        self.whole, self.mapped, self.store = (collections.Counter() for _ in range(3))
        self._load, self._open, self._file = torch.load, builtins.open, h5py.File
        self._mapping = False
        monkeypatch.setattr(torch, "load", self.load)
        monkeypatch.setattr(builtins, "open", self.open)
        monkeypatch.setattr(h5py, "File", self.file)

    def load(self, path, *arguments, mmap=None, **named):
        self._mapping = bool(mmap)
        try:
            return self._load(path, *arguments, mmap=mmap, **named)
        finally:
            self._mapping = False

    def open(self, path, mode="r", *arguments, **named):
        if isinstance(path, str | Path) and str(path).endswith(".pt") and "r" in mode:
            (self.mapped if self._mapping else self.whole)[os.path.relpath(path)] += 1
        return self._open(path, mode, *arguments, **named)

    def file(self, path, *arguments, **named):
        self.store[str(path)] += 1
        return self._file(path, *arguments, **named)

    def take(self):
        """The counts since the last time."""
        found = dict(self.whole), dict(self.mapped), dict(self.store)
        for each in (self.whole, self.mapped, self.store):
            each.clear()
        return found


@pytest.fixture
def reads(tmp_path, monkeypatch):
    shutil.copytree(WRITTEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Reads(monkeypatch)


def test_commands_that_use_a_checkpoint(reads):
    best, device = ["--checkpoint", "single/muq_best_r1.pt"], ["--device", "cpu"]
    once = {"single/muq_best_r1.pt": 1}
    evaluate.main([*best, *device, "--json"])
    assert reads.take() == (once, {}, {STORE: OPENED + 1})
    report_page.main([*best, *device])
    assert reads.take() == (once, {}, {STORE: OPENED + 1})
    export.main([*best, "--out", "exported"])
    assert reads.take() == (once, {}, {})
    search.main(["calm piano", *best, *LIBRARY])
    assert reads.take() == (once, {}, {})
    index_library.main(["--reindex", *best, *LIBRARY])
    assert reads.take() == (once, {}, {})


def run(encoder, folder, *more):
    train.main(["--audio-encoder", *encoder.split(), *TRAIN, "--checkpoint-dir", folder, "--log-dir", "logs", *more])


def test_training_anew_and_over_a_finished_run(reads):
    """The best checkpoint is read to be tested; of an earlier run's nobody reads the weights."""
    of_run = {STORE: OPENED + OPENED + SPLITS}  # the first is closed before the text model is fetched
    for names in ("muq", "mert latent"):
        folder = names.replace(" ", "_")
        tested = {f"{folder}/{name}_best_r1.pt": 1 for name in names.split()}
        run(names, folder, "--epochs", "1")
        assert reads.take() == (tested, {}, of_run)
        run(names, folder, "--epochs", "1")
        whole, mapped, store = reads.take()
        assert (whole, store) == (tested, of_run)
        last = f"{folder}/{'joint' if len(tested) > 1 else names}_last.pt"
        assert set(tested) | {last} <= set(mapped)
        assert sum(mapped.values()) <= 1 + 2 * len(tested), mapped


def test_training_that_goes_on(reads):
    """Once to go on from, once to be tested; whose the best one is, is known without its weights."""
    more = ["--epochs", "3", "--resume", "auto"]
    run("muq", "single", *more)
    whole, mapped, store = reads.take()
    assert whole == {"single/muq_last.pt": 1, "single/muq_best_r1.pt": 1}
    assert mapped == {"single/muq_best_r1.pt": 1}
    assert store == {STORE: OPENED + OPENED + SPLITS}
    run("muq", "single", *more)  # it is finished
    assert reads.take() == ({"single/muq_last.pt": 1}, {"single/muq_best_r1.pt": 1}, {})
