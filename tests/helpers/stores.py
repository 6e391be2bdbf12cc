"""Small stores with made-up vectors."""

import numpy as np

from store.reading import SPLITS, Split, StoreHeader

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
