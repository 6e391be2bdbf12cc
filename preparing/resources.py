"""What a run of prepare_dataset.py will take of time and disk: the lines of its plan that are sums."""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from common.plan_lines import busy_note, free_bytes, gigabytes, named
from embedding_models.lengths import Lengths, estimate_lengths
from embedding_models.pace import TIMED_SECONDS, Device, Pace, decoding_of_a_clip, pace_of, together
from embedding_models.precision import stored_type
from embedding_models.registry import DEFAULTS, ENCODERS, H100, Encoder, model_flag, spec_from_flags
from preparing.clips import FileClips
from preparing.musicbench import PUBLISHED_ROWS
from preparing.recordings import Dataset

# Clips a second of prepare_dataset.py from end to end with all three default encoders, on 400 clips, before they were
# made faster (docs/measurements.md, "On a GPU")
H100_END_TO_END = {"float32": 20, "float16": 27}


def windows_of(dataset: Dataset) -> Lengths:
    """Windows of ten seconds in a data set's files, by their headers; one for each recording that is in an archive."""
    if isinstance(dataset.clips, FileClips):
        wanted = {recording.audio_id for recording in dataset.recordings}
        paths = [path for audio_id, path in dataset.clips.paths.items() if audio_id in wanted]
        return estimate_lengths([(path, path.stat().st_size) for path in paths if path.is_file()])
    count = len(dataset.recordings)
    return Lengths(count, 0, 0, 10.0 * count, count)


def published_windows(val_fraction: float, limit: int | None) -> Lengths:
    """The same for MusicBench as it is published: clips of ten seconds. `limit` is of each split."""
    held_out = round(PUBLISHED_ROWS["train"] * val_fraction)
    splits = (PUBLISHED_ROWS["train"] - held_out, held_out, PUBLISHED_ROWS["test"])
    count = sum(rows if limit is None else min(rows, limit) for rows in splits)
    return Lengths(count, 0, 0, 10.0 * count, count)


def paces(args: argparse.Namespace, encoders: Sequence[Encoder], device: Device) -> dict[str, Pace]:
    """What each encoder takes, timed for two seconds in all; `UserError` where a folder holds no such model."""
    specs = [spec_from_flags(args, encoder, args.device, args.dtype) for encoder in encoders]
    seconds = TIMED_SECONDS / len(specs)
    return {spec.encoder.name: pace_of(spec, args.batch_size, device, seconds) for spec in specs}


def disk_lines(
    args: argparse.Namespace,
    dims: Iterable[int],
    recordings: int,
    downloads: Mapping[str, int | None],
    later: Mapping[str, int],
) -> Iterator[str]:
    """The disk that it takes, with what training will add: bytes by what it is. dims: widths of the vectors."""
    store = recordings * np.dtype(stored_type(args.dtype)).itemsize * sum(dims)
    fetched = sum(size for size in downloads.values() if size is not None)
    unknown = sum(size is None for size in downloads.values())
    most = fetched + max(2 * store, store + sum(later.values()))
    again = "as much again while shards are merged, or where recordings were skipped and the rest is copied"
    yield from named("disk", f"store {gigabytes(store)} in {args.output_dir}; {again}")
    for what, size in later.items():
        yield from named("", f"later, for training: {what} {gigabytes(size)}")
    missing = f" and {unknown} downloads of unknown size" if unknown else ""
    free = gigabytes(free_bytes(Path(args.output_dir)))
    fetched_too = f" with downloads ({gigabytes(fetched)}){missing}" if downloads else ""
    yield from named("", f"at most {gigabytes(most)}{fetched_too}; where the store goes {free} are free")


def time_lines(
    args: argparse.Namespace, found: Mapping[str, Pace], lengths: Lengths, device: torch.device
) -> Iterator[str]:
    """The hours that it takes in one process on the device, seconds by encoder, and a card that was timed."""
    decoding = decoding_of_a_clip()
    encoding = sum(pace.seconds for pace in found.values())
    hours = lengths.windows * together(encoding, decoding, device, args.num_workers) / 3600
    shards = f"; a shard of {args.num_splits} takes its share" if args.num_splits > 1 else ""
    windows = f"{lengths.windows:,} windows of 10 s{shards}"
    yield from named("time", f"about {hours:,.2f} h in one process on {device} for {windows}")
    for name, pace in found.items():
        yield from named("", f"{name} {pace.seconds:.3g} s a window ({pace.origin})")
    yield from named("", f"decoding {decoding:.2g} s a window in each of {args.num_workers} threads{busy_note()}")
    if device.type == "cuda" and any("by arithmetic" in pace.origin for pace in found.values()):
        yield from named("", "the arithmetic is from times measured on a CPU, so rough for a GPU")
    yield from named("on a GPU", _timed_on_card(args, [ENCODERS[name] for name in found], lengths))


def _timed_on_card(args: argparse.Namespace, encoders: Sequence[Encoder], lengths: Lengths) -> str:
    """What is known of the published networks on a card."""
    rates = {encoder.name: encoder.timed.get(H100, {}).get(args.dtype) for encoder in encoders}
    known = {name: rate for name, rate in rates.items() if rate}
    missing = [name for name in rates if name not in known]
    if not known or any(model_flag(args, encoder) for encoder in encoders):
        return f"not known: no card was timed with {'this model' if known else 'it'} in {args.dtype}"
    hours = lengths.windows * sum(1 / rate for rate in known.values()) / 3600
    rated = ", ".join(f"{name} {rate:g}" for name, rate in known.items())
    text = f"the networks alone take {hours:,.2f} h on {H100} (clips/s in {args.dtype}: {rated}"
    text += f"; {', '.join(missing)} not timed)" if missing else ")"
    if set(rates) == set(DEFAULTS) and args.dtype in H100_END_TO_END:
        rate = H100_END_TO_END[args.dtype]
        hours = lengths.windows / rate / 3600
        text += f"; from end to end it made {rate} clips/s there in an earlier version, by which {hours:,.2f} h"
    return text
