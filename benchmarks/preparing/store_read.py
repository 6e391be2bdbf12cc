"""Reading random batches at MERT's width: embeddings.h5 through EmbeddingStore against a .npy memmap.

Prints rows/s, cold (both files' pages dropped before each pass) and warm, and the ratio, for several rounds
and over all. A round reads store, npy, npy, store, so that neither gains by its turn.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from store.reading import EmbeddingStore, Split, StoreHeader, vector_block
from store.writing import create_store, write_statistics

WIDTH, BATCH = 76_800, 32


def make_files(folder: Path, rows: int, dtype: str) -> tuple[EmbeddingStore, np.ndarray]:
    """Write the same random vectors as a store and as a .npy file; return both, mapped."""
    names = [str(row) for row in range(rows)]
    entry = {"id": "random", "revision": None, "dim": WIDTH, "sample_rate": 24000, "recipe": "none"}
    header = StoreHeader("random", None, 0, dtype, {"mert": entry})
    splits = {
        "train": Split(names, names, names, np.arange(rows), ["main"] * rows),
        "val": Split(),
        "test": Split(),
    }
    blocks = create_store(folder / "embeddings.h5", header, splits)
    stored = blocks[vector_block("train", "mert")].map(folder / "embeddings.h5", "r+")
    plain = np.lib.format.open_memmap(folder / "plain.npy", "w+", dtype, (rows, WIDTH))
    rng = np.random.default_rng(0)
    for row in range(rows):
        stored[row] = plain[row] = rng.standard_normal(WIDTH, np.float32)
    stored.flush()
    plain.flush()
    write_statistics(folder / "embeddings.h5", blocks, ["mert"])
    os.sync()
    return EmbeddingStore(folder / "embeddings.h5"), np.load(folder / "plain.npy", mmap_mode="r")


def drop_pages(path: Path) -> None:
    """Ask the kernel to forget the file's pages; maps of it must be closed for that to work."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_to_read(open_vectors, batches: list[np.ndarray]) -> float:
    """Read all batches through a fresh map."""
    started = time.perf_counter()
    vectors = open_vectors()
    for rows in batches:
        np.take(vectors, rows, axis=0)
    return time.perf_counter() - started


def compare(readers: dict, state: str, rounds: int, rows: int) -> None:
    """Print the speeds of both readers and their ratio, round by round."""
    total = dict.fromkeys(readers, 0.0)
    if state == "warm":
        # Both are read in afresh from front to back: pages that came in by random reads stay slower to copy, for either
        # file (20,000 rows/s against 30,000), so what the cold rounds left behind would decide the comparison.
        for path, open_vectors in readers.values():
            drop_pages(path)
            seconds_to_read(open_vectors, np.array_split(np.arange(rows), rows // BATCH))
    for number in range(rounds):
        order = np.random.default_rng(number).permutation(rows)
        batches = [np.sort(part) for part in np.array_split(order, rows // BATCH)]
        seconds = dict.fromkeys(readers, 0.0)
        for reader in ("store", "npy", "npy", "store"):
            if state == "cold":
                for path, _ in readers.values():
                    drop_pages(path)
            seconds[reader] += seconds_to_read(readers[reader][1], batches)
        columns = "   ".join(f"{reader} {2 * rows / seconds[reader]:8,.0f} rows/s" for reader in readers)
        print(f"{state}   {columns}   ratio {seconds['npy'] / seconds['store']:.2f}")
        total = {reader: total[reader] + seconds[reader] for reader in readers}
    print(f"{state}   speed of the store over that of npy, all rounds: {total['npy'] / total['store']:.2f}")


def main(argv: list[str] | None = None) -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog="example: python -m benchmarks.preparing.store_read --rows 1536",
    )
    parser.add_argument("--rows", type=int, default=3072)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        store, plain = make_files(folder, args.rows, args.dtype)
        del plain  # a live map would keep its pages
        readers = {
            "store": (store.path, lambda: store.vectors("train", "mert")),
            "npy": (folder / "plain.npy", lambda: np.load(folder / "plain.npy", mmap_mode="r")),
        }
        for state in ("cold", "warm"):
            compare(readers, state, args.rounds, args.rows)


if __name__ == "__main__":
    main()
