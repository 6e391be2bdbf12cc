"""Captions of random words, as long as MusicBench's are assumed to be: a description, and control sentences."""

import numpy as np

WORDS = (
    *("calm", "happy", "slow", "fast", "soft", "bright"),
    *("piano", "guitar", "drum", "bass", "strings", "voice"),
    *("song", "with", "and", "a", "the", "under", "line"),
)


def random_captions(rng: np.random.Generator, count: int) -> list[str]:
    """Captions of 49 +- 21 words (lognormal), each with up to four control sentences of 6 to 14 words more."""
    spread = np.sqrt(np.log(1 + (21 / 49) ** 2))
    lengths = np.clip(rng.lognormal(np.log(49) - spread**2 / 2, spread, count), 8, 150).astype(int)
    for _ in range(4):
        lengths += rng.integers(0, 2, count) * rng.integers(6, 15, count)
    return [" ".join(rng.choice(WORDS, length)) for length in lengths]
