"""Recordings with their captions: what a data set reader hands on, how rows become recordings, and the split."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError
from preparing.clips import ClipSource
from store.reading import SPLITS

LEAK, NO_CAPTION = "leak", "no caption"


@dataclass(frozen=True)
class Caption:
    """One text about a recording. `kind` is "main" or "alt"; in MusicBench's test "A/main" ... "B/alt"."""

    kind: str
    text: str


@dataclass(frozen=True)
class Recording:
    """One audio file. Recordings of one source (a clip and its augmented copies) share `source_id`."""

    audio_id: str
    source_id: str
    split: str
    captions: tuple[Caption, ...]


@dataclass
class Dataset:
    """Recordings in their final order (train, val, test; within a split the order of the metadata).

    `dropped` maps a reason ("leak": its source is also in a held-out split; "no caption") to audio ids.
    """

    name: str
    revision: str | None
    recordings: list[Recording]
    dropped: dict[str, list[str]]
    clips: ClipSource


@dataclass(frozen=True)
class Row:
    """One line of metadata: captions as (kind, anything), the place of the line for error messages.

    `split` is None where the table has no splits (then no row has one). `group` keeps apart the caption sets of one
    recording ("A", "B"): a text that occurs twice in one group is kept once.
    """

    audio_id: str
    source_id: str
    split: str | None
    captions: list[tuple[str, object]]
    where: str
    group: str = ""


@dataclass
class _Entry:
    """A recording while its rows are being gathered; `texts` holds kind by (group, text)."""

    audio_id: str
    source_id: str
    split: str | None
    texts: dict[tuple[str, str], str] = field(default_factory=dict)


def read_json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield (line number from 1, object) of a JSON Lines file; blank lines and a byte order mark are fine.

    Raises UserError that names file and line where a line is not one JSON object.
    """
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                line = line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()
                if line:
                    yield number, _parse_line(path, number, line)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _parse_line(path: Path, number: int, line: bytes) -> dict:
    if line.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`, or download it again")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: also broken UTF-8 and endless numbers
        raise UserError(f"{path}, line {number}: expected one JSON object, found malformed JSON ({error})") from error
    if not isinstance(row, dict):
        raise UserError(f"{path}, line {number}: expected one JSON object, found {type(row).__name__}")
    return row


def clean_text(value: object) -> str | None:
    """The text without surrounding white space; None for what is not a text or is empty.

    NUL characters and lone surrogates, which HDF5 strings cannot hold, are replaced.
    """
    if not isinstance(value, str):
        return None
    text = value.replace("\0", " ").encode("utf-8", "replace").decode("utf-8").strip()
    return text or None


def storable(text: str) -> bool:
    """Whether an id can be stored as it is: no NUL, no lone surrogate."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def build_recordings(
    rows: Iterable[Row], val_fraction: float, seed: int, limit: int | None
) -> tuple[list[Recording], dict[str, list[str]]]:
    """Merge rows of one audio, drop leaks and what has no caption, split by source; the fixed order of `Dataset`.

    Where the rows say test and train but not val, val is taken from train; where they say nothing, test and val
    are each `val_fraction` of the recordings. `limit` keeps the first N recordings of each split, for trials.
    """
    if not 0 <= val_fraction < 1:
        raise UserError(f"--val-fraction must be at least 0 and below 1, found {val_fraction}")
    entries, dropped = _drop(_merge(rows))
    if any(entry.split is None for entry in entries):
        _hold_out(entries, None, "test", val_fraction, seed)
        _hold_out(entries, None, "val", val_fraction / (1 - val_fraction), seed)
    elif all(entry.split != "val" for entry in entries):
        _hold_out(entries, "train", "val", val_fraction, seed)
    by_split: dict[str, list[Recording]] = {split: [] for split in SPLITS}
    for entry in entries:
        captions = tuple(Caption(kind, text) for (_, text), kind in entry.texts.items())
        split = entry.split or "train"
        by_split[split].append(Recording(entry.audio_id, entry.source_id, split, captions))
    return [recording for split in SPLITS for recording in by_split[split][:limit]], dropped


def _merge(rows: Iterable[Row]) -> list[_Entry]:
    """One entry per audio id and split, in the order in which they first occur, with all their texts."""
    entries: dict[tuple[str, str | None], _Entry] = {}
    sources: dict[str, str] = {}
    for row in rows:
        source_id = sources.setdefault(row.audio_id, row.source_id)
        if source_id != row.source_id:
            raise UserError(
                f"{row.where}: {row.audio_id} was given the source id {source_id} before, now {row.source_id}"
            )
        key = (row.audio_id, row.split)
        entry = entries.setdefault(key, _Entry(row.audio_id, row.source_id, row.split))
        for kind, value in row.captions:
            text = clean_text(value)
            if text is not None:
                entry.texts.setdefault((row.group, text), kind)
    return list(entries.values())


def _drop(entries: list[_Entry]) -> tuple[list[_Entry], dict[str, list[str]]]:
    """Leave out recordings whose source is in a more held-out split (test before val before train), or mute ones."""
    held_out = {split: {entry.source_id for entry in entries if entry.split == split} for split in ("val", "test")}
    forbidden: dict[str | None, set[str]] = {"train": held_out["val"] | held_out["test"], "val": held_out["test"]}
    kept: list[_Entry] = []
    dropped: dict[str, list[str]] = {LEAK: [], NO_CAPTION: []}
    for entry in entries:
        if entry.source_id in forbidden.get(entry.split, ()):
            dropped[LEAK].append(entry.audio_id)
        elif not entry.texts:
            dropped[NO_CAPTION].append(entry.audio_id)
        else:
            kept.append(entry)
    return kept, dropped


def _hold_out(entries: list[_Entry], from_split: str | None, to_split: str, fraction: float, seed: int) -> None:
    """Move whole sources, `fraction` of the recordings of `from_split`, to `to_split`."""
    sizes = Counter(entry.source_id for entry in entries if entry.split == from_split)
    chosen = choose_sources(sizes, fraction, seed)
    for entry in entries:
        if entry.split == from_split and entry.source_id in chosen:
            entry.split = to_split


def choose_sources(sizes: dict[str, int], fraction: float, seed: int) -> set[str]:
    """Choose sources that hold `fraction` of all recordings, as nearly as whole sources allow.

    `sizes` is the number of recordings by source id. The sources are taken in the order of a keyed BLAKE2 hash
    of seed and id: the choice depends on the set of recordings only, not on the order of the metadata, the
    machine or Python's hash seed. At least one source is chosen where there are two and `fraction` is not 0.
    """
    order = sorted(sizes, key=lambda source: hashlib.blake2b(f"{seed}\0{source}".encode(), digest_size=16).digest())
    missing = round(fraction * sum(sizes.values()))
    chosen: dict[str, int] = {}
    for source in order:
        if sizes[source] <= missing:
            chosen[source] = sizes[source]
            missing -= sizes[source]
    rest = {source: sizes[source] for source in order if source not in chosen}
    while missing:  # what is left over is smaller than any other source: add, exchange or remove one while it helps
        step = _best_step(set(chosen.values()), set(rest.values()), missing)
        if step is None:
            break
        _move(step[0], chosen, rest)
        _move(step[1], rest, chosen)
        missing -= step[1] - step[0]
    if not chosen and fraction > 0 and len(rest) > 1:
        _move(min(rest.values()), rest, chosen)
    return set(chosen)


def _best_step(chosen: set[int], rest: set[int], missing: int) -> tuple[int, int] | None:
    """Sizes of the source to take out and of the one to take in (0: none) that bring the sum nearest to its target.

    None where every step leads further away.
    """
    steps = [(taken, given) for taken in sorted({0} | chosen) for given in sorted({0} | rest)]
    best = min(steps, key=lambda step: abs(missing - (step[1] - step[0])))
    return best if abs(missing - (best[1] - best[0])) < abs(missing) else None


def _move(size: int, origin: dict[str, int], target: dict[str, int]) -> None:
    """Move the first source of that size; none for size 0."""
    source = next((source for source, found in origin.items() if found == size), None)
    if source is not None:
        target[source] = origin.pop(source)
