"""The frozen encoders on the card: clips a second in each precision, agreement with the CPU, prepare_dataset.py."""

import csv
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile
import torch

import prepare_dataset
from benchmarks.card.timing import forget, peak_gib, seconds_of
from embedding_models.base import AudioEmbeddingModel
from embedding_models.precision import PRECISIONS
from examples.make_tiny_models import FOLDERS, encoder_spec

CLIP_SECONDS = 10


def noise(encoder: AudioEmbeddingModel, clips: int) -> torch.Tensor:
    """Ten-second clips of noise that changes its loudness, in the encoder's rate and channels."""
    generator = torch.Generator().manual_seed(1)
    samples = CLIP_SECONDS * encoder.sample_rate
    shape = (clips, samples) if encoder.channels == 1 else (clips, encoder.channels, samples)
    envelope = torch.linspace(0, 12, samples).sin().abs() * 0.1 + 0.02
    return torch.randn(shape, generator=generator) * envelope


def measure_encoders(folder: Path, device: torch.device, small: bool) -> Iterator[tuple[str, dict[str, float]]]:
    """Each encoder in each precision: clips/s, peak GiB, largest difference to the CPU / largest value, cosine."""
    batch_size, rounds, warm = (2, 1, 0) if small else (32, 3, 2)
    for name in FOLDERS:
        reference = None
        for precision in PRECISIONS:
            forget(device)
            encoder = replace(encoder_spec(folder, name, str(device)), precision=precision).load()
            clips = noise(encoder, batch_size)
            if reference is None:
                reference = encoder_spec(folder, name, "cpu").load().embed_windows(clips[:2])
            vectors = encoder.embed_windows(clips[:2])
            seconds = seconds_of(
                lambda encoder=encoder, clips=clips: encoder.embed_windows(clips), device, rounds, warm
            )
            yield (
                f"{name} {precision}",
                {
                    "clips/s": batch_size / seconds,
                    "peak GiB": peak_gib(device),
                    "difference": float((vectors - reference).abs().max() / reference.abs().max()),
                    "1 - cosine": 1 - float(torch.cosine_similarity(vectors.double(), reference.double()).min()),
                },
            )
            del encoder


def write_clips(folder: Path, count: int) -> Path:
    """A table of wav clips of 10 s at 16 kHz, as MusicBench's are taken to be."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    with open(folder / "clips.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["audio", "caption", "split"])
        for number in range(count):
            sound = rng.normal(0, 0.1, 16_000 * CLIP_SECONDS) * np.linspace(0.2, 1, 16_000 * CLIP_SECONDS)
            soundfile.write(folder / f"{number}.wav", sound, 16_000)
            split = "val" if number % 20 == 1 else "test" if number % 20 == 2 else "train"
            table.writerow([f"{number}.wav", f"noise number {number}", split])
    return folder / "clips.csv"


def measure_preparing(
    models: Path, table: Path, out: Path, device: torch.device, clips: int, workers: int
) -> Iterator[tuple[str, dict[str, float]]]:
    """prepare_dataset.py from end to end in each precision: clips/s with and without loading, seconds of each stage."""
    shared = f"--dataset {table} --device {device} --num-workers {workers} --batch-size 32"
    shared += f" --muq-model {models / 'muq_mulan'} --muq-backbone {models / 'muq_large'}"
    shared += f" --mert-model {models / 'mert'} --latent-model {models / 'music2latent'}"
    for dtype in PRECISIONS:
        forget(device)
        start = time.perf_counter()
        prepare_dataset.main(f"{shared} --output-dir {out / dtype} --dtype {dtype}".split())
        whole = time.perf_counter() - start
        yield f"prepare {dtype}", {"clips/s": clips / whole, "peak GiB": peak_gib(device), **last_stages()}


def last_stages() -> dict[str, float]:
    """Seconds of each stage of the last prepare_dataset.py, from the closing line of its log."""
    lines = [line for line in Path("prepare_dataset.log").read_text().splitlines() if "seconds  " in line]
    stages = re.findall(r"([a-z0-9 ()]+) ([\d.]+)", lines[-1].split("seconds  ")[1])
    return {name.strip(): float(value) for name, value in stages}
