"""The set that test_quality.py learns: 224 rendered recordings as MusiCNN hears them, with two captions each.

PYTHONPATH=.:tests python -m helpers.quality_set      # renders and embeds them anew, into tests/data/quality
"""

import json
from pathlib import Path

import numpy as np
import torch

from embedding_models.enrichment import RECIPE
from store.reading import Split, StoreHeader
from store.writing import write_store

FOLDER = Path(__file__).resolve().parents[1] / "data/quality"
TRAIN, VAL, TEST = 144, 16, 64


def make() -> None:
    from embedding_models import MusiCNNModel
    from examples.demo_captions import describe
    from examples.make_demo_dataset import plan, samples

    train, test = plan(TRAIN + VAL, TEST, seed=0, copies=0)
    clips = [clip._replace(sample_rate=16_000, channels=1) for clip in (*train, *test)]
    captions = [describe(clip.piece, np.random.default_rng([9, number])) for number, clip in enumerate(clips)]
    encoder = MusiCNNModel(device="cpu")
    vectors = [
        encoder.embed_windows(torch.from_numpy(samples(clip).T / 32768).float()).half().numpy() for clip in clips
    ]
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / "musicnn.npz", vectors=np.concatenate(vectors))
    (FOLDER / "captions.json").write_text(json.dumps(captions, indent=0) + "\n")


def write_quality_store(path: Path, shift: int = 0) -> None:
    """A store of the set; with `shift` every train recording has the captions of the one so many places on."""
    vectors = np.load(FOLDER / "musicnn.npz")["vectors"]
    captions = json.loads((FOLDER / "captions.json").read_text())
    captions[:TRAIN] = captions[shift:TRAIN] + captions[:shift]
    entry = {"id": "MSD_musicnn", "revision": "0.1.0", "dim": vectors.shape[1], "sample_rate": 16_000, "recipe": RECIPE}
    header = StoreHeader("rendered music", None, 0, "float16", {"musicnn": entry})
    splits, rows = {}, {}
    for name, start, count in (("train", 0, TRAIN), ("val", TRAIN, VAL), ("test", TRAIN + VAL, TEST)):
        names = [f"{name}{row:03}" for row in range(count)]
        texts = [text for pair in captions[start : start + count] for text in pair]
        kinds = ["A/main", "A/alt"] if name == "test" else ["main", "alt"]
        splits[name] = Split(names, names, texts, np.repeat(np.arange(count), 2), kinds * count)
        rows[name, "musicnn"] = vectors[start : start + count]
    write_store(path, header, splits, rows)


if __name__ == "__main__":
    make()
