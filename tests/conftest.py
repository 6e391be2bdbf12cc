"""Fixtures that several test files share."""

import numpy as np
import pytest

from text_to_audio.store import SPLITS, Split, StoreHeader

DIMS = {"muq": 6, "latent": 4}


def make_header(dtype="float32", dims=None):
    encoders = {
        name: {"id": f"tiny/{name}", "revision": None, "dim": dim, "sample_rate": 24000, "recipe": "test"}
        for name, dim in (dims or DIMS).items()
    }
    return StoreHeader("test recordings", None, 0, dtype, encoders)


def make_splits(sizes=(7, 3, 4), captions=2):
    """Splits of `sizes` recordings with `captions` captions each, one source per recording."""
    splits = {}
    for name, rows in zip(SPLITS, sizes, strict=True):
        splits[name] = Split(
            [f"data/{name}{row:04d}.wav" for row in range(rows)],
            [f"{name}-source-{row}" for row in range(rows)],
            [f"{name} caption {row} – naïve {i}" for row in range(rows) for i in range(captions)],
            np.repeat(np.arange(rows), captions),
            ["main" if i == 0 else "alt" for _ in range(rows) for i in range(captions)],
        )
    return splits


def make_vectors(header, splits, seed=0):
    rng = np.random.default_rng(seed)
    return {
        (name, encoder): rng.normal(3, 2, (len(split.audio_id), entry["dim"])).astype(header.dtype)
        for name, split in splits.items()
        for encoder, entry in header.encoders.items()
    }


@pytest.fixture
def store_parts():
    header, splits = make_header(), make_splits()
    return header, splits, make_vectors(header, splits)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Tiny checkpoints of the three audio encoders and a Qwen3 text encoder, in the published formats."""
    from examples.make_tiny_models import main

    folder = tmp_path_factory.mktemp("models")
    main(["--out", str(folder)])
    return folder
