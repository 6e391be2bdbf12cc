"""Checkpoints on tiny models, short synthetic music, and index_library.py run on them, for the tests of libraries."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import index_library
from embedding_models.enrichment import RECIPE
from examples.make_tiny_models import encoder_spec
from helpers.small_musicbench import clip
from helpers.tiny_text_models import make_bert
from music_library.milvus_index import FIELD, VectorDatabase
from music_library.vector_files import VectorFiles
from text_to_audio.config import TrainingConfig
from text_to_audio.model.checkpoints import model_state, save_checkpoint
from text_to_audio.model.head import ProjectionHead
from text_to_audio.model.text_encoder import TextEncoder


def spec(models, name="muq"):
    return encoder_spec(models, name, device="cpu")


def write_checkpoint(path, models, text_model, name="muq", seed=0, standardise="zscore", recipe=RECIPE):
    """A checkpoint with a random head for a tiny encoder's space."""
    path = Path(path)
    dim = spec(models, name).load().dim
    config = TrainingConfig(name, text_model=text_model, device="cpu", standardise=standardise)
    config.text_dim, config.audio_dim, config.hidden_dim = 32, dim, 16
    torch.manual_seed(seed)
    encoder, head = TextEncoder(config), ProjectionHead(32, 16, dim)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    head.set_statistics(torch.randn(dim).numpy() * 0.1, torch.rand(dim).numpy() + 0.5, standardise)
    space = {"id": spec(models, name).model, "revision": None, "dim": dim, "sample_rate": 24_000, "recipe": recipe}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, {**model_state(config, encoder, head), "audio_space": space})
    return path


def write_music(folder, count=6, seconds=3.0, suffixes=(".wav", ".flac", ".ogg", ".mp3")):
    """Tracks that differ, in formats by turns, with tags by libsndfile where the format has them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = folder / f"track {number}{suffixes[number % len(suffixes)]}"
        write_track(path, number, seconds + number / 2)
    return folder


def write_track(path, number, seconds=3.0, rate=22_050):
    samples = clip(number, seconds, rate, channels=2)
    with soundfile.SoundFile(path, "w", rate, 2) as file:
        if path.suffix != ".mp3":
            file.title, file.artist, file.album = f"Title {number}", f"Artist {number % 3}", "Album"
        file.write(samples)
    return path


def base_text_model(folder):
    return make_bert(folder)


@pytest.fixture(scope="module")
def checkpoints(tiny_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    base = base_text_model(folder / "base")
    write_checkpoint(folder / "muq.pt", tiny_models, base)
    write_checkpoint(folder / "other.pt", tiny_models, base, seed=1)
    write_checkpoint(folder / "mert.pt", tiny_models, base, "mert")
    write_checkpoint(folder / "foreign.pt", tiny_models, base, recipe="some other recipe")
    return folder


@pytest.fixture
def index(checkpoints, tiny_models, tmp_path, monkeypatch):
    """Run index_library.py in a folder of its own; returns what it logged."""
    monkeypatch.chdir(tmp_path)

    def run(*words, checkpoint="muq.pt"):
        Path("index_library.log").unlink(missing_ok=True)
        index_library.main([*map(str, words), "--checkpoint", str(checkpoints / checkpoint), *flags(tiny_models)])
        return Path("index_library.log").read_text()

    return run


def flags(models):
    return ["--device", "cpu", "--muq-backbone", str(models / "muq_large")]


def indexed(name="muq", fields=("path", "title", FIELD)):
    """What Milvus holds: path -> row. A duplicate fails."""
    with VectorDatabase("data/library.db") as database:
        rows = list(database.rows(name, list(fields)))
    assert len({row["path"] for row in rows}) == len(rows)
    return {Path(row["path"]).name: row for row in rows}


def plain(space="muq"):
    with VectorFiles("data/library.vectors", space) as files:
        return {Path(track.path).name: np.array(files.vectors[track.row]) for track in files.tracks()}
