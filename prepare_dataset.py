"""Embed MusicBench, or one's own recordings, with the three frozen audio encoders: audio -> embeddings.h5."""

import argparse
import errno
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from logging import Logger
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import hub
from common.errors import UserError, run_script
from common.logs import start_log
from embedding_models import AudioError, MertModel, MuQEmbeddingModel, MusicLatentSpaceModel
from embedding_models.base import AudioEmbeddingModel, choose_device
from embedding_models.costs import PUBLISHED, matmul_tflops
from embedding_models.enrichment import RECIPE
from embedding_models.pipeline import Finished, StageSeconds, embed_clips
from embedding_models.precision import PRECISIONS
from preparing.merging import finish
from preparing.musicbench import PUBLISHED_ROWS, download_sizes, open_dataset
from preparing.recordings import Dataset
from preparing.shards import check_finished, discard, open_shard
from preparing.work_file import DONE, STATE_OF_REASON, TODO, Lock, WorkFile
from store.reading import SPLITS, EmbeddingStore, StoreHeader
from store.verifying import faults

ENCODERS = ("muq", "mert", "latent")
LINE_EVERY = 60.0  # seconds between lines of progress in the log
EXAMPLES = """examples:
  python prepare_dataset.py --plan
  python prepare_dataset.py --output-dir data/musicbench_embeddings --device cuda --dtype float32
  python prepare_dataset.py --dataset /data/MusicBench --encoders muq --dtype float16
  CUDA_VISIBLE_DEVICES=0 python prepare_dataset.py --split-id 0 --num-splits 2 &
  CUDA_VISIBLE_DEVICES=1 python prepare_dataset.py --split-id 1 --num-splits 2 &
  python prepare_dataset.py --verify data/musicbench_embeddings/embeddings.h5

The same command goes on where it was stopped."""
DTYPE_HELP = (
    "float32; tf32: float32 vectors, products rounded to TF32 on CUDA; float16: float16 vectors, on CUDA MERT and "
    "Music2Latent in half precision and MuQ in TF32 (%(default)s)"
)
DATASET_HELP = (
    "a folder with MusicBench's files, or a table (JSON Lines, CSV, Parquet) of your own recordings; "
    "without it MusicBench is downloaded"
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output-dir", default="data/musicbench_embeddings", help="folder of embeddings.h5 (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    add("--dtype", choices=PRECISIONS, default="float32", help=DTYPE_HELP)
    add("--dataset", help=DATASET_HELP)
    add("--revision", help="MusicBench's revision on the hub (a pinned one)")
    add("--encoders", nargs="+", choices=ENCODERS, default=list(ENCODERS), help="which encoders (all three)")
    for flag, name in (("muq", "MuQ-MuLan"), ("mert", "MERT"), ("latent", "Music2Latent")):
        add(f"--{flag}-model", help=f"hub id or folder of {name} (the published one)")
    add("--muq-backbone", help="hub id or folder with the config.json of MuQ-MuLan's MuQ (the one it names)")
    add("--batch-size", type=int, default=8, help="windows of 10 s per encoder call (%(default)s)")
    add("--num-workers", type=int, default=os.cpu_count() or 1, help="decoding threads (%(default)s)")
    add("--val-fraction", type=float, default=0.1, help="share of train that is validation (%(default)s)")
    add("--seed", type=int, default=42, help="seed of the split (%(default)s)")
    add("--limit", type=int, help="only the first recordings of each split, for a trial")
    add("--split-id", type=int, default=0, help="which shard this process computes, from 0 (%(default)s)")
    add("--num-splits", type=int, default=1, help="number of shards (%(default)s)")
    add("--overwrite", action="store_true", help="start anew over what is in --output-dir")
    add("--plan", action="store_true", help="print time, disk, downloads and licences; fetch nothing")
    add("--verify", metavar="FILE", help="check a finished store and leave")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns its exit code and raises `UserError` for what the user can mend."""
    args = build_parser().parse_args(argv)
    if args.verify:
        return verify(args.verify)
    check_arguments(args)
    if args.plan:
        print_plan(args)
        return 0
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = start_log("prepare_dataset", "prepare_dataset.log")
        lock = Lock(
            folder / f"embeddings.shard-{args.split_id}-of-{args.num_splits}.lock",
            wait=False,
            message=f"{folder}: another process is computing shard {args.split_id} of {args.num_splits}",
        )
    except OSError as error:
        raise UserError(f"{error.filename}: expected to write there, found: {error.strerror}") from error
    try:
        return prepare(args, folder, log)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{folder}: the disk is full; free some space and run again, done rows are kept") from error
    except UserError as error:
        log.error("stopped: %s", error)
        raise
    finally:
        lock.release()


def check_arguments(args: argparse.Namespace) -> None:
    """Raise one `UserError` that lists every argument out of range."""
    wrong = [
        (args.batch_size < 1, f"--batch-size {args.batch_size}: at least 1"),
        (args.num_workers < 1, f"--num-workers {args.num_workers}: at least 1"),
        (not 0 <= args.val_fraction < 1, f"--val-fraction {args.val_fraction}: 0 to below 1"),
        (args.limit is not None and args.limit < 1, f"--limit {args.limit}: at least 1"),
        (args.num_splits < 1, f"--num-splits {args.num_splits}: at least 1"),
        (not 0 <= args.split_id < args.num_splits, f"--split-id {args.split_id}: 0 to --num-splits - 1"),
    ]
    if texts := [text for is_wrong, text in wrong if is_wrong]:
        raise UserError("; ".join(texts))


def prepare(args: argparse.Namespace, folder: Path, log: Logger) -> int:
    """Compute this process's shard, and the store once every shard is done."""
    started = time.perf_counter()
    target = folder / "embeddings.h5"
    if args.overwrite:
        discard(folder, args.split_id, args.num_splits)
    dataset = open_dataset(args.dataset, args.revision, args.val_fraction, args.seed, args.limit)
    report_dataset(dataset, log)
    encoders = load_encoders(args)
    header = describe(dataset, encoders, args)
    if target.exists():
        check_finished(target, header, dataset)
        log.info("%s is complete already", target)
        return closing_table(target, StageSeconds(), started, log)
    seconds = StageSeconds()
    work = open_shard(folder, header, dataset, args.split_id, args.num_splits)
    if work is not None:  # None: killed at the last step, only the rename is left
        try:
            embed(work, dataset, encoders, args, seconds, log)
        finally:
            work.close()
    if finish(folder, args.num_splits, log.info) is None:
        return 0
    return closing_table(target, seconds, started, log)


def print_plan(args: argparse.Namespace) -> None:
    """Print what a run with these arguments downloads, writes and takes; fetches nothing."""
    if args.dataset:
        recordings = len(open_dataset(args.dataset, None, args.val_fraction, args.seed, args.limit).recordings)
        downloads = {}
    else:
        recordings = sum(PUBLISHED_ROWS.values())
        downloads, origin = download_sizes(args.revision)
        print(f"data set    MusicBench, CC-BY-SA-3.0, {recordings:,} recordings ({origin})")
    for name in args.encoders:
        published, model = PUBLISHED[name], getattr(args, f"{name}_model")
        print(f"encoder     {name}: {model or published.model}, weights {published.licence} (non-commercial)")
        if model is None:
            downloads |= weights_sizes(name)
    for name, size in downloads.items():
        print(
            f"download    {name}: {'size unknown, the hub did not answer' if size is None else f'{size / 1e9:.2f} GB'}"
        )
    itemsize = np.dtype(stored_type(args.dtype)).itemsize
    store = recordings * itemsize * sum(PUBLISHED[name].dim for name in args.encoders)
    print(f"disk        store {store / 1e9:.1f} GB in {args.output_dir} at published widths; as much again while")
    print("            shards are merged, or where recordings were skipped and the rest is copied")
    device = choose_device(args.device)
    speed = matmul_tflops(device)
    hours = recordings * sum(PUBLISHED[name].tflop for name in args.encoders) / speed / 3600
    print(f"time        about {hours:,.1f} h in one process on {device} ({speed:.2f} TFLOP/s in float32 just now); an")
    print("            estimate from times measured on a CPU, so rough for a GPU, where decoding may set the pace")


def weights_sizes(name: str) -> dict[str, int | None]:
    """Bytes of a published encoder's files, asked of the hub; None where it does not answer."""
    published = PUBLISHED[name]
    try:
        sizes = hub.file_sizes(published.model, list(published.files))
    except UserError:
        return {published.model: None}
    return {f"{published.model} {file}": size for file, size in sizes.items()}


def load_encoders(args: argparse.Namespace) -> list[AudioEmbeddingModel]:
    """Load the encoders that were asked for, in a fixed order."""
    shared = {"device": args.device, "precision": args.dtype}
    classes = {"muq": MuQEmbeddingModel, "mert": MertModel, "latent": MusicLatentSpaceModel}
    encoders = []
    for name in ENCODERS:
        if name not in args.encoders:
            continue
        model = getattr(args, f"{name}_model")
        options = shared | ({"model": model} if model else {})
        if name == "muq":
            options["backbone"] = args.muq_backbone
        encoders.append(classes[name](**options))
    return encoders


def describe(dataset: Dataset, encoders: list[AudioEmbeddingModel], args: argparse.Namespace) -> StoreHeader:
    """Return the header of the store that this run makes.

    TF32 is named in the encoders' entries: its vectors are stored as float32 and are not those of float32.
    """
    rounding = {"precision": "tf32"} if args.dtype == "tf32" else {}
    entries = {
        encoder.name: {
            "id": encoder.model,
            "revision": encoder.revision,
            "dim": encoder.dim,
            "sample_rate": encoder.sample_rate,
            "recipe": RECIPE,
            **rounding,
        }
        for encoder in encoders
    }
    return StoreHeader(dataset.name, dataset.revision, args.seed, stored_type(args.dtype), entries)


def stored_type(precision: str) -> str:
    """The type on disk of vectors computed in a precision."""
    return "float16" if precision == "float16" else "float32"


def report_dataset(dataset: Dataset, log: Logger) -> None:
    """Say what was found in the metadata."""
    counts = Counter(recording.split for recording in dataset.recordings)
    log.info("%s: %s recordings", dataset.name, " + ".join(f"{counts[name]:,} {name}" for name in SPLITS))
    for reason, audio_ids in dataset.dropped.items():
        if audio_ids:
            log.info("left out, %s: %s recordings", reason, f"{len(audio_ids):,}")


def embed(
    work: WorkFile,
    dataset: Dataset,
    encoders: list[AudioEmbeddingModel],
    args: argparse.Namespace,
    seconds: StageSeconds,
    log: Logger,
) -> None:
    """Settle every row of the shard that is still to do."""
    rows = {
        work.splits[name].audio_id[row]: (name, row)
        for name in SPLITS
        for row in np.flatnonzero(work.state(name) == TODO).tolist()
    }
    total, next_line = len(work.states), time.perf_counter() + LINE_EVERY
    log.info("shard %d of %d: %d of %d rows to do", args.split_id, args.num_splits, len(rows), total)
    if not rows:
        return
    dataset.clips.prepare()
    size = dataset.clips.size_bytes
    with (
        tqdm(total=total, initial=total - len(rows), unit="clip", desc="embedding") as bar,
        tqdm(total=size, unit="B", unit_scale=True, desc="reading", position=1, leave=False) as reading,
    ):
        clips = dataset.clips.read(set(rows), lambda position: reading.update(position - reading.n))

        def write(finished: Finished) -> None:
            nonlocal next_line
            started = time.perf_counter()
            settle(work, rows, finished, log)
            seconds.write += time.perf_counter() - started
            bar.update(len(finished))
            if time.perf_counter() >= next_line:
                log.debug("%s", bar)  # into the file alone, for `tail -f prepare_dataset.log`
                next_line = time.perf_counter() + LINE_EVERY

        batches = embed_clips(clips, encoders, args.batch_size, args.num_workers, seconds)
        write_meanwhile(batches, write)
    mark_missing(work, rows, dataset, log)


def write_meanwhile(batches: Iterator[Finished], write: Callable[[Finished], None]) -> None:
    """Write each batch in a thread of its own while the next is computed; a failure to write is raised here."""
    with ThreadPoolExecutor(1, "writer") as writer:
        writing: Future | None = None
        for finished in batches:
            if writing is not None:
                writing.result()
            writing = writer.submit(write, finished)
        if writing is not None:
            writing.result()


def settle(work: WorkFile, rows: dict[str, tuple[str, int]], finished: Finished, log: Logger) -> None:
    """Write one batch's recordings, then their states; they leave `rows`."""
    states = []
    for audio_id, result in finished:
        split, row = rows.pop(audio_id)
        if isinstance(result, AudioError):
            reason, text = result.reason, str(result)
        elif all(work.write(split, row, encoder, vector) for encoder, vector in result.items()):
            states.append((split, row, DONE))
            continue
        else:
            reason, text = "not finite", f"a vector does not fit {work.header.dtype}"
        log.warning("skipped %s: %s (%s)", audio_id, reason, text)
        states.append((split, row, STATE_OF_REASON[reason]))
    work.commit(states)


def mark_missing(work: WorkFile, rows: dict[str, tuple[str, int]], dataset: Dataset, log: Logger) -> None:
    """Settle the rows whose audio never came; all of them missing is a wrong data set, not a skip."""
    if len(rows) == len(work.states) and rows:
        raise UserError(
            f"{dataset.name}: none of the {len(rows):,} recordings in the metadata is among its audio files, "
            f"such as {next(iter(rows))}"
        )
    for audio_id in rows:
        log.warning("skipped %s: missing", audio_id)
    work.commit([(split, row, STATE_OF_REASON["missing"]) for split, row in rows.values()])


def closing_table(target: Path, seconds: StageSeconds, started: float, log: Logger) -> int:
    """Print rows per split, what was skipped and why, sizes, and where the time went."""
    store = EmbeddingStore(target)
    log.info("%-8s %12s %12s %12s", "split", "recordings", "sources", "captions")
    for name in SPLITS:
        split = store.split(name)
        counts = len(split.audio_id), len(set(split.source_id)), len(split.caption)
        log.info("%-8s %12s %12s %12s", name, *(f"{count:,}" for count in counts))
    reasons = sorted(Counter(reason for _, reason in store.skipped()).items())
    log.info("skipped  %s", ", ".join(f"{reason}: {count:,}" for reason, count in reasons) or "none")
    widths = ", ".join(f"{name} {entry['dim']:,}" for name, entry in store.encoders.items())
    log.info("file     %s, %s MB, %s: %s", target, f"{target.stat().st_size / 1e6:,.1f}", store.header.dtype, widths)
    stages = {"decode (all workers)": seconds.decode, "waiting for audio": seconds.wait, **seconds.encode}
    stages |= {"writing": seconds.write, "total": time.perf_counter() - started}
    log.info("seconds  %s", ", ".join(f"{stage} {value:.1f}" for stage, value in stages.items()))
    return 0


def verify(path: str) -> int:
    """Print what is wrong with a store; 0 where nothing is."""
    found = list(faults(path))
    for line in found:
        print(f"{path}: {line}")
    if not found:
        store = EmbeddingStore(path)
        rows = ", ".join(f"{name} {len(store.split(name).audio_id):,}" for name in SPLITS)
        print(f"{path}: good ({rows}; {', '.join(store.encoders)}; {store.header.dtype})")
    return 1 if found else 0


if __name__ == "__main__":
    run_script(main)
