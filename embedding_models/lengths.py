"""How long audio files are, by what their headers say: an estimate for plans, nothing is decoded."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mutagen
import soundfile

from embedding_models.audio import WINDOW_SECONDS

HEADERS = 500  # are read at most: a second's work on a disk
_LEAST_OF_A_KIND = 20

SizedFile = tuple[Path, int]  # and its bytes


@dataclass(frozen=True)
class Lengths:
    """Of so many files: seconds and windows of ten seconds, estimated from the headers of `looked_at` of them.

    unknown: files of kinds in which no header that was looked at tells a length; they are not counted in.
    """

    files: int
    looked_at: int
    unknown: int
    seconds: float
    windows: int


def stated_seconds(path: Path) -> float:
    """How long a file says it is, in seconds; 0 where it does not tell or cannot be read."""
    try:
        length = getattr(getattr(mutagen.File(path), "info", None), "length", 0)
    except Exception:  # mutagen fails on a broken file in as many ways as it can be broken
        length = 0
    if not length:
        try:
            length = soundfile.info(path).duration
        except (soundfile.SoundFileError, OSError):
            length = 0
    return float(length) if math.isfinite(length) else 0.0


def windows_in(seconds: float) -> int:
    """Windows that a track of this length is cut into; see `track_windows`."""
    return max(1, math.ceil(seconds / WINDOW_SECONDS))


def estimate_lengths(files: Sequence[SizedFile], headers: int = HEADERS) -> Lengths:
    """Estimate from the headers of at most about so many files, evenly picked among those of each suffix.

    Seconds and windows go with the bytes, among files of one suffix.
    """
    kinds: dict[str, list[SizedFile]] = defaultdict(list)
    for path, size in files:
        kinds[path.suffix.lower()].append((path, size))
    looked_at = unknown = 0
    seconds = windows = 0.0
    for of_kind in kinds.values():
        picked = evenly(of_kind, max(_LEAST_OF_A_KIND, headers * len(of_kind) // max(1, len(files))))
        looked_at += len(picked)
        told = [(size, length) for path, size in picked if (length := stated_seconds(path))]
        if not told:
            unknown += len(of_kind)
            continue
        share = sum(size for _, size in of_kind) / max(1, sum(size for size, _ in told))
        seconds += share * sum(length for _, length in told)
        windows += share * sum(windows_in(length) for _, length in told)
    return Lengths(len(files), looked_at, unknown, seconds, round(windows))


def evenly(items: Sequence[SizedFile], count: int) -> list[SizedFile]:
    """At most `count` of the items, from all over the sequence."""
    step = max(1.0, len(items) / count)
    return [items[int(number * step)] for number in range(min(count, len(items)))]
