"""What a run of prepare_dataset.py will download, write and take, before anything is fetched."""

import argparse
from collections.abc import Iterator

import numpy as np

from common.device import choose_device
from common.speed import matmul_tflops
from embedding_models.precision import stored_type
from embedding_models.registry import ENCODERS, model_flag
from preparing.musicbench import PUBLISHED_ROWS, download_sizes
from preparing.opening import open_dataset


def plan_lines(args: argparse.Namespace) -> Iterator[str]:
    """The plan for a command line of prepare_dataset.py, line by line. Raises `UserError` as `open_dataset` does."""
    encoders = [ENCODERS[name] for name in args.encoders]
    downloads: dict[str, int | None] = {}
    if args.dataset:
        recordings = len(open_dataset(args.dataset, None, args.val_fraction, args.seed, args.limit).recordings)
    else:
        recordings = sum(PUBLISHED_ROWS.values())
        sizes, origin = download_sizes(args.revision)
        downloads |= sizes
        yield f"data set    MusicBench, CC-BY-SA-3.0, {recordings:,} recordings ({origin})"
    for encoder in encoders:
        model = model_flag(args, encoder)
        yield f"encoder     {encoder.name}: {model or encoder.weights.id}, weights {encoder.terms}"
        if model is None:
            downloads |= encoder.weights.downloads()
    for name, size in downloads.items():
        shown = "size unknown, the hub did not answer" if size is None else f"{size / 1e9:.2f} GB"
        yield f"download    {name}: {shown}"
    store = recordings * np.dtype(stored_type(args.dtype)).itemsize * sum(encoder.dim for encoder in encoders)
    yield f"disk        store {store / 1e9:.1f} GB in {args.output_dir} at published widths; as much again while"
    yield "            shards are merged, or where recordings were skipped and the rest is copied"
    device = choose_device(args.device)
    speed = matmul_tflops(device)
    hours = recordings * sum(encoder.tflop for encoder in encoders) / speed / 3600
    yield f"time        about {hours:,.1f} h in one process on {device} ({speed:.2f} TFLOP/s in float32 just now); an"
    yield "            estimate from times measured on a CPU, so rough for a GPU, where decoding may set the pace"
