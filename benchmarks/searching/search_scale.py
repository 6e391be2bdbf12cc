"""Milvus at the size of a large library: time and size of an index, latency and recall of searches, the narrow form."""

import argparse
import multiprocessing
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch

from common.errors import UserError, run_script
from music_library.index_space import IndexSpace
from music_library.milvus_index import FIELD, INDEX_TYPES, IndexChoice, VectorDatabase
from text_to_audio.model.head import ProjectionHead
from text_to_audio.model.inference import embed_texts_batch, load_checkpoint

TOP = 10
_BLOCK = 2000  # tracks made, sent or compared at once
EPILOG = """Tracks and queries are synthetic: points of a random subspace of --rank dimensions with noise on top, at
unit length, since real audio vectors are of low rank too (uniform ones have no neighbours to find). Each index is made
in a process of its own, so that its peak memory is its own.

examples:
  python -m benchmarks.searching.search_scale    (100,000 tracks, about half an hour on 2 cores)
  python -m benchmarks.searching.search_scale --tracks 5000 --wide-tracks 500 --queries 100
  python -m benchmarks.searching.search_scale --checkpoint checkpoints/muq_best_r1.pt  (also times the text encoding)"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tracks", type=int, default=100_000, help="(%(default)s)")
    add("--dim", type=int, default=1536, help="width of the vectors (%(default)s)")
    add("--rank", type=int, default=64, help="dimensions of the subspace (%(default)s)")
    add("--noise", type=float, default=0.3, help="length of the noise beside the signal's (%(default)s)")
    add("--queries", type=int, default=1000, help="(%(default)s)")
    add("--types", nargs="+", default=list(INDEX_TYPES), choices=INDEX_TYPES, help="(all)")
    add("--nprobe", type=int, nargs="+", default=[10, 64], help="of IVF_FLAT (%(default)s)")
    add("--nlist", type=int, default=128, help="of IVF_FLAT (%(default)s)")
    add("--ef", type=int, nargs="+", default=[128, 256, 512, 1024], help="of HNSW (%(default)s)")
    add("--wide-dim", type=int, default=76_800, help="width of the space for the narrow form (%(default)s)")
    add("--wide-tracks", type=int, default=5000, help="its tracks; 0 leaves it out (%(default)s)")
    add("--hidden-dim", type=int, default=1024, help="of its head (%(default)s)")
    add("--checkpoint", metavar="FILE", help="time the encoding of texts with this one")
    add("--folder", metavar="DIR", help="where the databases are made (a temporary folder)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    return parser


def low_rank(count: int, basis: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Unit vectors (count, dim) float32 near the rows of `basis` (rank, dim)."""
    signal = rng.standard_normal((count, len(basis)), np.float32) @ basis
    signal /= np.linalg.norm(signal, axis=1, keepdims=True)
    extra = rng.standard_normal(signal.shape, np.float32)
    signal += noise * extra / np.linalg.norm(extra, axis=1, keepdims=True)
    return signal / np.linalg.norm(signal, axis=1, keepdims=True)


def exact_neighbours(tracks: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The TOP best tracks of each query by brute force, (queries, TOP)."""
    scores = np.concatenate([queries @ tracks[i : i + _BLOCK].T for i in range(0, len(tracks), _BLOCK)], axis=1)
    return np.argsort(-scores, axis=1)[:, :TOP]


def overlap(found: list[list[int]], exact: np.ndarray) -> float:
    """Mean share of the exact neighbours among those found."""
    return float(np.mean([len(set(a) & set(b.tolist())) / TOP for a, b in zip(found, exact, strict=True)]))


def percentiles(seconds: list[float]) -> str:
    """Median and 95th percentile in milliseconds."""
    p50, p95 = np.percentile(seconds, [50, 95]) * 1000
    return f"p50 {p50:7.1f} ms   p95 {p95:7.1f} ms"


def settings(kind: str, args: argparse.Namespace) -> list[dict]:
    """The search parameters that are tried for an index type."""
    if kind == "IVF_FLAT":
        return [{"nprobe": value} for value in args.nprobe]
    return [{"ef": value} for value in args.ef] if kind == "HNSW" else [{}]


def measure(kind: str, args: argparse.Namespace, folder: Path, name: str) -> None:
    """Make one index from `folder/NAME_tracks.npy`, wait until it is confirmed, and search it; prints what it finds."""
    tracks, queries = np.load(folder / f"{name}_tracks.npy", mmap_mode="r"), np.load(folder / f"{name}_queries.npy")
    exact = np.load(folder / f"{name}_exact.npy")
    build = {"nlist": args.nlist} if kind == "IVF_FLAT" else {}
    path, started = folder / f"{name}_{kind}.db", time.perf_counter()
    with VectorDatabase(str(path), create=True) as database:
        index = IndexChoice(kind, build)
        database.create(name, tracks.shape[1], index, {})
        for start in range(0, len(tracks), _BLOCK):
            database.upsert(name, [_row(start + i, v) for i, v in enumerate(tracks[start : start + _BLOCK])])
        inserted = time.perf_counter() - started
        database.build(name, index)
        whole = time.perf_counter() - started
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        assert database.count(name) == len(tracks)
        print(
            f"{name} {kind}: {len(tracks):,} x {tracks.shape[1]:,}: inserted in {inserted:.1f} s, index confirmed "
            f"after {whole:.1f} s, folder {size / 1e6:,.0f} MB, peak memory {peak:.2f} GB",
            flush=True,
        )
        for params in settings(kind, args):
            search(database, name, queries, exact, params)
        grown(database, name, queries)


def _row(number: int, vector: np.ndarray) -> dict:
    texts = {"path": f"/music/artist/album/{number:06} title.flac", "title": f"Title {number}", "artist": "Artist"}
    return {"id": number, FIELD: vector, "version": 0, "album": "Album", "duration": 200.0, **texts}


def search(database: VectorDatabase, name: str, queries: np.ndarray, exact: np.ndarray, params: dict) -> None:
    """Ask one query at a time, then all at once; print latency and recall.

    Beside the clock's times stands the median of the CPU's, which other work on the machine changes less: Milvus Lite
    is in this process.
    """
    fields, seconds, own, found = ["path", "title", "artist", "album", "duration"], [], [], []
    for query in queries:
        started, cpu = time.perf_counter(), time.process_time()
        (hits,) = database.search(name, query[None], TOP, fields, params)
        seconds.append(time.perf_counter() - started)
        own.append(time.process_time() - cpu)
        found.append([hit.id for hit in hits])
    started = time.perf_counter()
    for start in range(0, len(queries), 32):
        database.search(name, queries[start : start + 32], TOP, fields, params)
    batched = (time.perf_counter() - started) / len(queries) * 1000
    shown = ", ".join(f"{key} {value}" for key, value in params.items()) or "-"
    print(
        f"    {shown:<12} overlap@{TOP} {overlap(found, exact):.4f}   database {percentiles(seconds)}   "
        f"CPU {1000 * np.median(own):.1f} ms   "
        f"in batches of 32: {batched:.1f} ms a query",
        flush=True,
    )


def grown(database: VectorDatabase, name: str, queries: np.ndarray) -> None:
    """Print how much memory many queries leave behind."""
    process = psutil.Process()
    before = process.memory_info().rss
    for query in queries:
        database.search(name, query[None], TOP, [], {})
    print(
        f"    memory after {len(queries)} more queries: {(process.memory_info().rss - before) / 1e6:+.1f} MB",
        flush=True,
    )


def in_a_process(kind: str, args: argparse.Namespace, folder: Path, name: str) -> None:
    """Run `measure` in a process of its own; its database is removed afterwards."""
    process = multiprocessing.get_context("spawn").Process(target=measure, args=(kind, args, folder, name))
    process.start()
    process.join()
    shutil.rmtree(folder / f"{name}_{kind}.db", ignore_errors=True)
    if process.exitcode != 0:
        raise UserError(f"{name} {kind}: the measuring process failed with {process.exitcode}")


def save(folder: Path, name: str, tracks: np.ndarray, queries: np.ndarray, exact: np.ndarray) -> None:
    """Leave what a measuring process needs."""
    for what, content in (("tracks", tracks), ("queries", queries), ("exact", exact)):
        np.save(folder / f"{name}_{what}.npy", content)


def full_width(args: argparse.Namespace, folder: Path) -> None:
    """Synthetic tracks in `dim` dimensions, under each index type."""
    rng = np.random.default_rng(args.seed)
    basis = rng.standard_normal((args.rank, args.dim), np.float32)
    blocks = range(0, args.tracks, _BLOCK)
    tracks = np.concatenate([low_rank(min(_BLOCK, args.tracks - i), basis, args.noise, rng) for i in blocks])
    queries = low_rank(args.queries, basis, args.noise, rng)
    save(folder, "full", tracks, queries, exact_neighbours(tracks, queries))
    del tracks
    for kind in args.types:
        in_a_process(kind, args, folder, "full")


@torch.no_grad()
def narrow_form(args: argparse.Namespace, folder: Path) -> None:
    """Tracks of a wide space in the narrow form: its ranking against the wide one's, then each index type."""
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    head = ProjectionHead(384, args.hidden_dim, args.wide_dim).eval()
    started = time.perf_counter()
    space = IndexSpace("wide", head, "benchmark", "benchmark", narrow=True)
    print(f"narrow form: {args.wide_dim:,} -> {space.dim:,} dimensions, basis in {time.perf_counter() - started:.1f} s")
    # the tracks' subspace: partly what text reaches, partly not
    reach = head.project_text(torch.randn(args.rank, 384)).numpy()
    basis = 2 * reach + rng.standard_normal((args.rank, args.wide_dim), np.float32) / np.sqrt(args.wide_dim)
    texts = head.project_text(torch.randn(args.queries, 384)).numpy()
    narrow, scores = [], []
    for start in range(0, args.wide_tracks, 500):
        tracks = low_rank(min(500, args.wide_tracks - start), basis, args.noise, rng)
        scores.append(texts @ space.standardised(tracks).T)
        narrow.append(space.audio(tracks))
    scores, narrow, queries = np.concatenate(scores, axis=1), np.concatenate(narrow), space.queries(texts)
    exact = np.argsort(-scores, axis=1)[:, :TOP]
    small = queries @ narrow.T
    same = np.argsort(-small, axis=1)[:, :TOP]
    print(
        f"    exact search, {args.wide_tracks:,} tracks, {args.queries:,} queries: overlap@{TOP} "
        f"{overlap(same.tolist(), exact):.4f}, first the same in {np.mean(same[:, 0] == exact[:, 0]):.4f}, "
        f"largest difference of a cosine {np.abs(small - scores).max():.1e}"
    )
    save(folder, "narrow", narrow, queries, exact)
    for kind in args.types:
        in_a_process(kind, args, folder, "narrow")


def text_encoding(args: argparse.Namespace) -> None:
    """Time texts to vectors, one at a time and in batches of 32."""
    models = load_checkpoint(args.checkpoint)
    encoder, head, config = models
    words = ["calm", "happy", "slow", "dark", "piano", "guitar", "drums", "strings", "voice", "jazz", "dance", "with"]
    rng = np.random.default_rng(args.seed)
    texts = [" ".join(rng.choice(words, 8)) for _ in range(min(args.queries, 200))]
    device, seconds = str(config.torch_device), []
    for text in [texts[0], *texts]:
        started = time.perf_counter()
        embed_texts_batch([text], encoder, head, device)
        seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
    embed_texts_batch(texts, encoder, head, device)
    batched = (time.perf_counter() - started) / len(texts) * 1000
    print(f"text encoding ({config.text_model} on {device}): {percentiles(seconds[1:])}   in batches: {batched:.1f} ms")


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = build_parser().parse_args(argv)
    if args.checkpoint:
        text_encoding(args)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.tracks:
            full_width(args, Path(folder))
        if args.wide_tracks:
            narrow_form(args, Path(folder))


if __name__ == "__main__":
    run_script(main)
