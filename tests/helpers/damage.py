"""Flips, zeroes and cuts random places of a store, a work file and a library's catalogue; says what becomes of them.

PYTHONPATH=.:tests python -m helpers.damage [PLACES]     # 2,000 of each, in forked children with a time limit
"""

import collections
import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from common.errors import UserError
from helpers.stores import make_header, make_splits, make_vectors
from music_library.vector_files import Track, VectorFiles
from preparing.work_file import DONE, WorkFile
from store.reading import SPLITS, EmbeddingStore, read_blocks
from store.writing import write_store

SECONDS = 20
ABOUT = {"space": "muq", "dim": 6, "recipe": "r", "encoder": "tiny", "revision": ""}
Read = Callable[[Path], object]


def make_store(folder: Path) -> Path:
    header, splits = make_header(), make_splits((12, 4, 4))
    write_store(folder / "e.h5", header, splits, make_vectors(header, splits), [("gone.wav", "missing")])
    return folder / "e.h5"


def make_work_file(folder: Path) -> Path:
    work = WorkFile.create(folder / "w.h5", make_header(), make_splits((12, 4, 4)), {"dtype": "float32"}, [])
    work.commit([("train", 0, DONE), ("val", 1, 3)])
    work.close()
    return work.path


def make_library(folder: Path) -> Path:
    with VectorFiles(folder, "muq", ABOUT) as files:
        for number in range(20):
            (row,) = files.write("vectors", np.full((1, 6), number, np.float32))
            track = (number, f"/music/{number}.wav", 1, 2, b"hash", f"title {number}", "artist", "album", 3.0)
            files.put(Track(*track, row=row))
    return folder / "muq/catalogue.sqlite"


def read_store(path: Path) -> object:
    """Everything but the vectors and the statistics, which nothing protects."""
    store = EmbeddingStore(path)
    for name in SPLITS:
        for encoder in store.encoders:
            store.vectors(name, encoder).sum()
    texts = [vars(store.split(name)) for name in SPLITS]
    return str((store.header, [{key: list(value) for key, value in text.items()} for text in texts], store.skipped()))


def read_work_file(path: Path) -> object:
    work = WorkFile(path)
    try:
        return work.settings, work.states.tolist(), read_store(path)
    finally:
        work.close()


def read_library(path: Path) -> object:
    with VectorFiles(path.parents[1], "muq") as files:
        return len(files), list(files.tracks()), files.vectors.shape, files.find(path="/music/3.wav")


def changed(content: bytes, rng: np.random.Generator, spared: list[tuple[int, int]]) -> bytes:
    """The content with one place damaged: a bit, a byte, up to 512 bytes of zeros, or the end cut off."""
    while True:
        at = int(rng.integers(len(content)))
        if not any(start <= at < start + size for start, size in spared):
            break
    kind, result = rng.integers(5), bytearray(content)
    if kind == 0:
        return content[:at]
    if kind == 1:
        end = min([at + 512, len(content), *(start for start, _ in spared if start > at)])
        result[at:end] = bytes(end - at)
    elif kind == 2:
        result[at] ^= 255
    else:
        result[at] ^= 1 << int(rng.integers(8))
    return bytes(result)


def outcome(read: Read, path: Path, expected: object) -> str:
    """ "right", "one line", "other content", or what must not be: "hang", "crash", or an exception's name."""
    ready, done = os.pipe()
    child = os.fork()
    if not child:
        os.close(ready)
        try:
            word = "right" if read(path) == expected else "other content"
        except UserError as error:
            word = "one line" if "\n" not in str(error) else "several lines"
        except BaseException as error:
            word = f"{type(error).__name__}: {error}"
        os.write(done, word.encode()[:300])
        os._exit(0)
    os.close(done)
    in_time = select.select([ready], [], [], SECONDS)[0]
    word = os.read(ready, 300).decode() if in_time else "hang"
    os.close(ready)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return word or "crash"


def outcomes(kind: str, places: int, folder: Path, seed: int = 0) -> collections.Counter:
    """How often each outcome was met; kind: "store", "work file" or "library"."""
    make, read = {
        "store": (make_store, read_store),
        "work file": (make_work_file, read_work_file),
        "library": (make_library, read_library),
    }[kind]
    path = make(folder)
    content, expected, rng = path.read_bytes(), read(path), np.random.default_rng(seed)
    time.sleep(0.02)  # a check is not repeated within a tick of the file system's clock
    spared = []
    if kind != "library":
        blocks = read_blocks(path).items()
        spared = [(each.offset, each.row_bytes * each.shape[0]) for name, each in blocks if name != "states"]
    found: collections.Counter = collections.Counter()
    for _ in range(places):
        path.write_bytes(changed(content, rng, spared))
        found[outcome(read, path, expected)] += 1
    return found


if __name__ == "__main__":
    for each in ("store", "work file", "library"):
        with tempfile.TemporaryDirectory() as place:
            print(f"{each}: {dict(outcomes(each, int(sys.argv[1]) if len(sys.argv) > 1 else 2000, Path(place)))}")
