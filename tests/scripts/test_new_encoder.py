"""README's recipe for an audio encoder, followed to the letter in a copy of the toolkit: one file and one entry."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from helpers.small_library import write_music
from helpers.small_musicbench import SmallMusicBench
from helpers.tiny_text_models import make_bert
from store.reading import SPLITS, EmbeddingStore
from store.verifying import faults

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("common", "embedding_models", "store", "preparing", "text_to_audio", "music_library")
FILE = '''"""Energies of 48 bands of a magnitude spectrogram, weighed by a matrix that is read from a file."""

import os

import torch

from common.errors import UserError
from common.hub import fetch_model_folder
from embedding_models.base import AudioEmbeddingModel
from embedding_models.registry import ENCODERS
from embedding_models.weights import read_tensors


class YoursModel(AudioEmbeddingModel):
    """Mono at 16 kHz, 31.25 frames a second. `model` is a hub id or a folder with `model.safetensors`."""

    name = "yours"
    channels = 1
    sample_rate = 16_000

    def __init__(
        self,
        model: str | os.PathLike = ENCODERS["yours"].weights.id,
        device: str = "auto",
        precision: str = "float32",
        revision: str | None = None,
    ):
        super().__init__(model, revision, device, precision)
        path = fetch_model_folder(model, ["model.safetensors"], revision) / "model.safetensors"
        bands = read_tensors(path).get("bands")
        if bands is None or bands.ndim != 2 or bands.shape[1] != 513:
            raise UserError(f"{path}: expected a tensor `bands` of shape (bands, 513)")
        self.frame_dim = len(bands)
        self._bands = bands.to(self.device)
        self._window = torch.hann_window(1024, device=self.device)

    def _encode(self, waveforms: torch.Tensor) -> torch.Tensor:
        spectra = torch.stft(waveforms, 1024, 512, window=self._window, return_complex=True).abs()
        return torch.log1p(self._bands @ spectra).transpose(1, 2)
'''
DRIVER = """import importlib, json, sys
for script, *words in json.loads(sys.argv[1]):
    print("#", script, flush=True)
    importlib.import_module(script).main(words)
"""


def copy_of_the_toolkit(folder):
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    return folder


def entry_of_the_readme():
    recipe = (ROOT / "README.md").read_text().split("### Adding an audio encoder")[1]
    return textwrap.dedent(re.search(r"```python\n(.*?)```", recipe, re.DOTALL).group(1)).rstrip() + ",\n"


def follow_the_recipe(toolkit):
    assert len(FILE.splitlines()) < 60
    (toolkit / "embedding_models/yours.py").write_text(FILE)
    registry = toolkit / "embedding_models/registry.py"
    source, end = registry.read_text(), "    )\n}\n"
    assert source.count(end) == 1
    registry.write_text(source.replace(end, textwrap.indent(entry_of_the_readme(), " " * 8) + end))


def run(toolkit, folder, *commands):
    """Run commands in one process, as the toolkit takes seconds to import; returns what each printed."""
    environment = {**os.environ, "PYTHONPATH": str(toolkit), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = json.dumps([command.split() for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split("# ")[1:]


@pytest.mark.slow
def test_one_file_and_one_entry_go_all_the_way(tmp_path):
    toolkit = copy_of_the_toolkit(tmp_path / "toolkit")
    follow_the_recipe(toolkit)
    SmallMusicBench(train_sources=12, copies=1).write(tmp_path / "musicbench")
    write_music(tmp_path / "music", 6)
    make_bert(tmp_path / "text")
    (tmp_path / "weights").mkdir()
    bands = torch.rand(48, 513, generator=torch.Generator().manual_seed(0)) / 100
    save_file({"bands": bands}, tmp_path / "weights/model.safetensors")

    prepare = "prepare_dataset --dataset musicbench --device cpu --encoders yours"
    checkpoint = "--checkpoint checkpoints/yours_best_r1.pt"
    plan, published, _, _, _, evaluation, _, found, _ = run(
        toolkit,
        tmp_path,
        f"{prepare} --yours-model weights --plan",
        f"{prepare} --plan",
        f"{prepare} --yours-model weights --split-id 0 --num-splits 2",
        f"{prepare} --yours-model weights --split-id 1 --num-splits 2",
        "train --audio-encoder yours --text-model text --epochs 1 --batch-size 4 --gradient-accumulation-steps 2 "
        "--device cpu --hidden-dim 16 --warmup-steps 1",
        f"evaluate {checkpoint} --device cpu",
        "index_library music --audio-encoder yours --encoder-processes 2 --device cpu",
        f"search calm {checkpoint} --device cpu --json",
        f"export {checkpoint} --out exported",
    )
    assert "yours: weights, weights MIT (commercial use allowed)" in plan
    assert "download" not in plan
    assert "owner/yours: size unknown" in published
    store = EmbeddingStore(tmp_path / "data/musicbench_embeddings/embeddings.h5")
    assert list(faults(store.path)) == []
    assert {name: entry["dim"] for name, entry in store.encoders.items()} == {"yours": 144}
    assert sum(len(store.split(name).audio_id) for name in SPLITS) == 27
    assert all(np.linalg.norm(store.vectors(name, "yours"), axis=1).min() > 0 for name in SPLITS)
    assert "yours" in evaluation
    (answer,) = json.loads(found.removeprefix("search"))
    assert answer["query"] == "calm"
    assert len(answer["results"]) == 6
    card = (tmp_path / "exported/README.md").read_text()
    assert "(owner/yours) are MIT, which allows commercial use" in card
    assert "not for commercial use" not in card
