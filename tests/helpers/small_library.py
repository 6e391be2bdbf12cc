"""A checkpoint on tiny models and a folder of short synthetic music, for the tests of indexing and searching."""

from pathlib import Path

import soundfile
import torch

from embedding_models.enrichment import RECIPE
from examples.make_tiny_models import encoder_spec
from helpers.small_musicbench import clip
from helpers.tiny_text_models import make_bert
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
