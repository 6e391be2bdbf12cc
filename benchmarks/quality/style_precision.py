"""Does the search find the style one asks for? Held-out demo recordings, twelve fixed queries, the true styles counted.

The recordings are those of the demo data set's test split, which no training has seen; their true styles are known from
how they were drawn, not from captions. Everything runs through index_library.py and search.py's own code. Precision@5
is the share of recordings of the wanted style among the first five; chance is that share in the whole library.
"""

import argparse
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, this folder is the path
import index_library
from common.errors import run_script
from examples.make_demo_dataset import plan
from music_library.searching import open_searcher

QUERIES = {  # fixed before the first run: a style of the demo's, and words for it
    "jazz": "swing jazz in a small club",
    "rock": "classic rock with guitars",
    "metal": "heavy metal",
    "house": "electronic dance music, club house",
    "ambient": "drifting ambient without a beat",
    "classical": "chamber music, classical",
    "folk": "acoustic folk",
    "reggae": "roots reggae",
    "funk": "groovy funk",
    "drum and bass": "drum and bass, jungle",
    "chiptune": "8-bit chiptune",
    "march": "a military march",
}


def extract_tests(dataset: Path, names: set[str], folder: Path) -> None:
    """Write the recordings with these locations as files."""
    with tarfile.open(dataset / "MusicBench.tar.gz") as archive:
        for member in archive:
            location = member.name.partition("/")[2]
            if location in names:
                target = folder / Path(location).name
                target.write_bytes(archive.extractfile(member).read())


def build_parser() -> argparse.ArgumentParser:
    """The command line; the defaults are those of `make demo`."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__.splitlines()[0],
        epilog="example: python -m benchmarks.quality.style_precision   (after make demo)",
    )
    add = parser.add_argument
    add("--demo", type=Path, default=Path("demo"), help="the demo's folder (default: %(default)s)")
    add("--checkpoint", type=Path, help="default: checkpoints/muq_best_r1.pt in it")
    add("--sources", type=int, default=160, help="as the data set was drawn (default: %(default)s)")
    add("--test", type=int, default=64, help="as the data set was drawn (default: %(default)s)")
    add("--seed", type=int, default=0, help="as the data set was drawn (default: %(default)s)")
    add("--copies", type=int, default=1, help="as the data set was drawn (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Index, ask, count."""
    args = build_parser().parse_args(argv)
    checkpoint = args.checkpoint or args.demo / "checkpoints/muq_best_r1.pt"
    style_of = {
        Path(clip.location).name: clip.piece.style for clip in plan(args.sources, args.test, args.seed, args.copies)[1]
    }
    with tempfile.TemporaryDirectory() as name:
        music, uri, models = Path(name, "music"), str(Path(name, "library.db")), args.demo / "models"
        music.mkdir()
        extract_tests(args.demo / "musicbench", {f"data/{each}" for each in style_of}, music)
        index_library.main(
            [str(music), "--checkpoint", str(checkpoint), "--milvus-uri", uri, "--muq-model", str(models / "muq_mulan"),
             "--muq-backbone", str(models / "muq_large")]
        )  # fmt: skip
        searcher = open_searcher(checkpoint, uri)
        answers = searcher.find(searcher.embed(list(QUERIES.values())), k=5)
        searcher.close()
    styles = list(style_of.values())
    found, chances = [], []
    for (style, query), hits in zip(QUERIES.items(), answers, strict=True):
        right = [style_of[Path(hit.path).name] == style for hit in hits]
        found.append(np.mean(right))
        chances.append(styles.count(style) / len(styles))
        print(f"{query:<40} {sum(right)} of 5, chance {5 * chances[-1]:.2f}")
    ratio = np.mean(found) / np.mean(chances)
    print(f"precision@5 {np.mean(found):.3f}, chance {np.mean(chances):.3f}: {ratio:.1f} times chance")


if __name__ == "__main__":
    run_script(main)
