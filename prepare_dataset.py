"""Embed MusicBench, or one's own recordings, with frozen audio encoders: audio -> embeddings.h5."""

import argparse
import errno
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from logging import Logger
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import UserError, run_script
from common.files import locked
from common.logs import start_log
from embedding_models.audio import AudioError
from embedding_models.base import AudioEmbeddingModel
from embedding_models.enrichment import RECIPE
from embedding_models.pipeline import Finished, StageSeconds, embed_clips
from embedding_models.precision import PRECISIONS, stored_type
from embedding_models.registry import DEFAULTS, ENCODERS, add_encoder_flags, spec_from_flags
from preparing.changes import changes_since, check_replaceable, next_store_lines
from preparing.earlier_store import EarlierStore, Sources, gathered, noted_precision
from preparing.log_lines import log_dataset, log_store
from preparing.merging import finish
from preparing.opening import open_dataset
from preparing.plan import plan_lines
from preparing.recordings import Dataset
from preparing.shards import discard, open_shard, remove_leftovers
from preparing.work_file import DONE, STATE_OF_REASON, TODO, WorkFile
from store.reading import SPLITS, EmbeddingStore, StoreHeader
from store.verifying import faults
from text_to_audio.config import TrainingConfig
from text_to_audio.planning.published import TEXT_MODELS, checkpoint_bytes

LINE_EVERY = 60.0  # seconds between lines of progress in the log
EXAMPLES = """examples:
  python prepare_dataset.py --plan
  python prepare_dataset.py --limit 200 --output-dir data/trial
  python prepare_dataset.py --output-dir data/musicbench_embeddings --device cuda --dtype float32
  python prepare_dataset.py --dataset /data/MusicBench --encoders muq --dtype float16
  CUDA_VISIBLE_DEVICES=0 python prepare_dataset.py --split-id 0 --num-splits 2 &
  CUDA_VISIBLE_DEVICES=1 python prepare_dataset.py --split-id 1 --num-splits 2 &
  python prepare_dataset.py --verify data/musicbench_embeddings/embeddings.h5

The same command goes on where it was stopped. After a change of the data set or of what is asked for it makes a new
store, and takes from the one that is there every vector that still holds."""
DTYPE_HELP = (
    "float32; tf32: float32 vectors, products rounded to TF32 on CUDA; float16: float16 vectors, on CUDA computed in "
    "half precision by encoders that bear it, in TF32 by the others (%(default)s)"
)
ENCODERS_HELP = f"which encoders ({' '.join(DEFAULTS)})"
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
    add("--encoders", nargs="+", choices=tuple(ENCODERS), default=DEFAULTS, help=ENCODERS_HELP)
    add_encoder_flags(parser, "the published one")
    add("--batch-size", type=int, default=8, help="windows of 10 s per encoder call (%(default)s)")
    add("--num-workers", type=int, default=os.cpu_count() or 1, help="decoding threads (%(default)s)")
    add("--val-fraction", type=float, default=0.1, help="share of train that is validation (%(default)s)")
    add("--seed", type=int, default=42, help="seed of the split (%(default)s)")
    add("--limit", type=int, help="only the first recordings of each split, for a trial")
    add("--split-id", type=int, default=0, help="which shard this process computes, from 0 (%(default)s)")
    add("--num-splits", type=int, default=1, help="number of shards (%(default)s)")
    add("--overwrite", action="store_true", help="start anew over what is in --output-dir")
    add("--plan", action="store_true", help="print hours, disk, downloads and licences; fetch nothing")
    add("--verify", metavar="FILE", help="check a finished store and leave")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns its exit code and raises `UserError` for what the user can mend."""
    args = build_parser().parse_args(argv)
    if args.verify:
        return verify(args.verify)
    check_arguments(args)
    if args.plan:
        for line in [*plan_lines(args, needed_for_training), *next_store_lines(args)]:
            print(line)
        return 0
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = start_log("prepare_dataset", "prepare_dataset.log")
    except OSError as error:
        raise UserError(f"{error.filename}: expected to write there, found: {error.strerror}") from error
    lock = folder / f"embeddings.shard-{args.split_id}-of-{args.num_splits}.lock"
    busy = f"{folder}: another process is computing shard {args.split_id} of {args.num_splits}"
    try:
        with locked(lock, busy):
            return prepare(args, folder, log)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{folder}: the disk is full; free some space and run again, done rows are kept") from error
    except UserError as error:
        log.error("stopped: %s", error)
        raise


def needed_for_training(dims: Mapping[str, int]) -> dict[str, int]:
    """What train.py will put on the disk by its defaults -> bytes, with a run for each space; dims: their widths."""
    name, config = TrainingConfig.text_model, TrainingConfig
    checkpoints = checkpoint_bytes(TEXT_MODELS[name], dims.values(), config.lora_rank, config.hidden_dim)
    return {name: 2 * TEXT_MODELS[name].parameters, f"checkpoints of {', '.join(dims)}": checkpoints}


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
    started, seconds = time.perf_counter(), StageSeconds()
    target = folder / "embeddings.h5"
    if args.overwrite:
        discard(folder, args.split_id, args.num_splits)
    dataset = open_dataset(args.dataset, args.revision, args.val_fraction, args.seed, args.limit)
    log_dataset(dataset, log)
    specs = [spec_from_flags(args, e, args.device, args.dtype) for e in ENCODERS.values() if e.name in args.encoders]
    encoders = [spec.load() for spec in specs]  # in the registry's order, which is the store's
    header = describe(dataset, encoders, args)
    earlier = None
    if target.exists():
        earlier = earlier_store(target, header, dataset, args, log)
        if earlier is None:
            remove_leftovers(folder, header, dataset)
            log.info("%s is complete already", target)
            log_store(target, seconds, time.perf_counter() - started, log)
            return 0
    work = open_shard(folder, header, dataset, args.split_id, args.num_splits)
    if work is not None:  # None: killed at the last step, only the rename is left
        try:
            embed(work, dataset, encoders, Sources(earlier, header.encoders), args, seconds, log)
        finally:
            work.close()
            if earlier is not None:
                earlier.close()

    def is_made(path: Path) -> bool:
        return not changes_since(EmbeddingStore(path), header, dataset)

    if finish(folder, args.num_splits, log.info, is_made) is not None:  # None: other shards are still at work
        log_store(target, seconds, time.perf_counter() - started, log)
    return 0


def earlier_store(
    target: Path, header: StoreHeader, dataset: Dataset, args: argparse.Namespace, log: Logger
) -> EarlierStore | None:
    """What the next store can take of the finished one; None where that is what this run would make."""
    store = EmbeddingStore(target)
    changes = changes_since(store, header, dataset)
    if not changes:
        return None
    check_replaceable(store, header, changes, args.limit)
    earlier = EarlierStore(target, header, dataset)
    if not earlier.knows_any(dataset):
        raise UserError(
            f"{target}: holds none of the {len(dataset.recordings):,} recordings of {dataset.name}; "
            "use another --output-dir, or --overwrite"
        )
    log.info("%s is not what this run makes; a new one is made beside it and then takes its place:", target)
    for line in changes.lines():
        log.info("  %s", line)
    log.info("  its vectors hold in %s", ", ".join(earlier.spaces))
    if not earlier.has_digests:
        log.info("  it does not say which sound they are of: the data set's name, its revision and the id count")
    if nameless := [name for name in earlier.spaces if name not in store.header.weights]:
        log.info("  it does not say the weights of %s: the encoder's id and revision count", ", ".join(nameless))
    return earlier


def describe(dataset: Dataset, encoders: list[AudioEmbeddingModel], args: argparse.Namespace) -> StoreHeader:
    """Return the header of the store that this run makes."""
    rounding = noted_precision(args.dtype)
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
    weights = {encoder.name: encoder.weights_digest() for encoder in encoders}
    return StoreHeader(dataset.name, dataset.revision, args.seed, stored_type(args.dtype), entries, weights)


def embed(
    work: WorkFile,
    dataset: Dataset,
    encoders: list[AudioEmbeddingModel],
    sources: Sources,
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
    with tqdm(total=total, initial=total - len(rows), unit="clip", desc="embedding") as bar:

        def write(finished: Finished) -> None:
            nonlocal next_line
            started = time.perf_counter()
            settle(work, rows, sources, finished, log)
            seconds.write += time.perf_counter() - started
            bar.update(len(finished))
            if time.perf_counter() >= next_line:
                log.debug("%s", bar)  # into the file alone, for `tail -f prepare_dataset.log`
                next_line = time.perf_counter() + LINE_EVERY

        write_meanwhile(sources.unread_rows(list(rows)), write)
        if rows:
            write_meanwhile(gathered(read_and_embed(set(rows), dataset, encoders, sources, args, seconds)), write)
        kept = [audio_id for audio_id in rows if sources.is_kept(audio_id)]
        if len(rows) == total and len(kept) < total:
            raise UserError(
                f"{dataset.name}: none of the {total:,} recordings in the metadata is among its audio files, such as "
                f"{next(iter(rows))}"
            )
        write_meanwhile(sources.unread_rows(kept, gone=True), write)
    mark_missing(work, rows, log)
    for line in sources.lines():
        log.info("%s", line)


def read_and_embed(
    wanted: set[str],
    dataset: Dataset,
    encoders: list[AudioEmbeddingModel],
    sources: Sources,
    args: argparse.Namespace,
    seconds: StageSeconds,
) -> Iterator[Finished]:
    """Read the recordings and compute what is not taken of them, in lists as they are finished."""
    dataset.clips.prepare()
    size = dataset.clips.size_bytes
    with tqdm(total=size, unit="B", unit_scale=True, desc="reading", position=1, leave=False) as reading:
        clips = dataset.clips.read(wanted, lambda position: reading.update(position - reading.n))
        yield from embed_clips(
            sources.noted(clips), encoders, args.batch_size, args.num_workers, seconds, sources.wanted
        )


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


def settle(work: WorkFile, rows: dict[str, tuple[str, int]], sources: Sources, finished: Finished, log: Logger) -> None:
    """Write one batch's recordings, then their states; they leave `rows`."""
    states = []
    for key, result in finished:
        audio_id = str(key)
        split, row = rows.pop(audio_id)
        if isinstance(result, AudioError):
            sources.forget(audio_id)
            reason, text = result.reason, str(result)
        else:
            vectors, digest = sources.joined(audio_id, result)
            if all(work.write(split, row, encoder, vector) for encoder, vector in vectors.items()):
                if digest is not None:
                    work.write_digest(split, row, digest)
                states.append((split, row, DONE))
                continue
            reason, text = "not finite", f"a vector does not fit {work.header.dtype}"
        log.warning("skipped %s: %s (%s)", audio_id, reason, text)
        states.append((split, row, STATE_OF_REASON[reason]))
    work.commit(states)


def mark_missing(work: WorkFile, rows: dict[str, tuple[str, int]], log: Logger) -> None:
    """Settle the rows whose audio never came."""
    for audio_id in rows:
        log.warning("skipped %s: missing", audio_id)
    work.commit([(split, row, STATE_OF_REASON["missing"]) for split, row in rows.values()])


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
