"""What a run of prepare_dataset.py will download, write and take, before anything is fetched."""

import argparse
from collections.abc import Callable, Iterator, Mapping

from common.plan_lines import named
from embedding_models.pace import Device
from embedding_models.registry import ENCODERS, model_flag
from preparing.musicbench import download_sizes
from preparing.opening import open_dataset
from preparing.resources import disk_lines, paces, published_windows, time_lines, windows_of

Later = Callable[[Mapping[str, int]], Mapping[str, int]]


def plan_lines(args: argparse.Namespace, later: Later) -> Iterator[str]:
    """The plan for a command line of prepare_dataset.py, line by line. Raises `UserError` as `open_dataset` does.

    later: from the width of each space, what training on the store will put on the disk -> bytes.
    """
    encoders = [ENCODERS[name] for name in args.encoders]
    downloads: dict[str, int | None] = {}
    if args.dataset:
        dataset = open_dataset(args.dataset, None, args.val_fraction, args.seed, args.limit)
        recordings, lengths = len(dataset.recordings), windows_of(dataset)
        yield from named("data set", _of_files(args.dataset, recordings, lengths.looked_at, lengths.seconds))
    else:
        lengths = published_windows(args.val_fraction, args.limit)
        recordings = lengths.files
        sizes, origin = download_sizes(args.revision)
        downloads |= sizes
        yield from named("data set", f"MusicBench, CC-BY-SA-3.0, {recordings:,} recordings ({origin})")
    for encoder in encoders:
        model = model_flag(args, encoder)
        yield f"encoder     {encoder.name}: {model or encoder.weights.id}, weights {encoder.terms}"
        if model is None:
            downloads |= encoder.weights.downloads()
    for name, size in downloads.items():
        shown = "size unknown, the hub did not answer" if size is None else f"{size / 1e9:.2f} GB"
        yield f"download    {name}: {shown}"
    device = Device(args.device)
    found = paces(args, encoders, device)
    dims = {name: pace.dim for name, pace in found.items()}
    yield from disk_lines(args, dims.values(), recordings, downloads, later(dims))
    yield from time_lines(args, found, lengths, device.torch)
    yield from named("memory", MEMORY)
    yield from named("to try", "the same command with --limit 200 --output-dir DIR, then train.py --data-path "
                               "DIR/embeddings.h5")  # fmt: skip


# the manual's table: one run of all three published encoders
MEMORY = "about 8 GB on a CPU, 10 GiB of a GPU with all three published encoders; less with one"


def _of_files(name: str, recordings: int, looked_at: int, seconds: float) -> str:
    about = f", about {seconds / 3600:,.1f} h by the headers of {looked_at}" if looked_at else ", taken as 10 s each"
    return f"{name}, {recordings:,} recordings{about}"
