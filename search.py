"""Search an indexed library: by text, by a track that sounds alike, for moments inside tracks, or on a web page."""

import argparse
import sys
from functools import partial
from pathlib import Path

from common.errors import UserError, run_script
from music_library.flags import add_library_flags
from music_library.milvus_index import MAX_RESULTS
from music_library.playlists import as_json, one_line, table, write_playlist
from music_library.searching import Hit, Searcher, open_searcher, without

EXAMPLES = """examples:
  python search.py "calm piano with soft strings"
  python search.py "upbeat electronic dance music" --not vocals --k 20 --playlist dance.m3u8
  python search.py "guitar solo" --moments --checkpoint checkpoints/muq_best_r1.pt
  python search.py --like ~/Music/album/track.flac --json
  python search.py --queries queries.txt --json > answers.json       (one query a line; - reads stdin)
  python search.py "jazz" --milvus-uri http://localhost:19530 --map-path /srv/music=/mnt/music
  python search.py --serve --checkpoint checkpoints/muq_best_r1.pt     (a web page at http://127.0.0.1:8770/)"""

BYTE_ORDER_MARK = "\ufeff"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("query", nargs="*", metavar="QUERY", help="what to search for; several are answered one after another")
    add("--queries", metavar="FILE", help="a file with a query a line, or - for stdin")
    add("--like", metavar="TRACK", help="tracks that sound like this one: its path, or its id from --json")
    add("--not", dest="unwanted", action="append", default=[], metavar="TEXT", help="less of this; may be repeated")
    add("--not-weight", type=float, default=0.5, help="how much less, times the query's length (%(default)s)")
    add("--moments", action="store_true", help="rank tracks by their best ten seconds, and say where they are")
    add("--k", type=int, default=10, help="tracks per query (%(default)s)")
    add("--json", action="store_true", help="print JSON and nothing else")
    add("--playlist", metavar="FILE", help="also write what was found as a playlist (.m3u8)")
    add("--map-path", metavar="FROM=TO", help="the indexed paths start with FROM, here it is TO")
    add_library_flags(parser, "checkpoints/muq_best_r1.pt")
    add("--precision", choices=("bf16", "fp32"), default="", help="arithmetic of the text model (as it was trained)")
    add("--serve", action="store_true", help="a web page with a player, and its JSON API, until Ctrl-C")
    add("--host", default="127.0.0.1", help="with --serve: 0.0.0.0 lets the whole network in (%(default)s)")
    add("--port", type=int, default=8770, help="with --serve; 0 takes a free one (%(default)s)")
    return parser


def main(argv: list[str] | None = None) -> list[list[Hit]]:
    """Print what is found and return it, a list per query; raises `UserError` for what the user can mend."""
    args = build_parser().parse_args(argv)
    mapping = check_arguments(args)
    if args.serve:
        serve_page(args, mapping)
        return []
    queries = args.query + (read_queries(args.queries) if args.queries else [])
    if not queries and not args.like:
        raise UserError("expected a query, --queries FILE or --like TRACK")
    searcher = open_searcher(
        args.checkpoint, args.milvus_uri, args.milvus_token, args.device, mapping, args.vectors_dir, args.precision
    )
    try:
        answers = answer(searcher, queries, args)
    finally:
        searcher.close()
    if args.like:
        queries = [f"like {args.like}", *queries]
    if args.json:
        sys.stdout.write(as_json(queries, answers) + "\n")
    else:
        for query, hits in zip(queries, answers, strict=True):
            sys.stdout.write(f'"{one_line(query)}"\n{table(hits)}\n\n')
    if args.playlist:
        for path in write_playlist(args.playlist, answers):
            print(f"left out of {args.playlist}, its name has a line break: {one_line(path)}", file=sys.stderr)
    return answers


def check_arguments(args: argparse.Namespace) -> tuple[str, str] | None:
    """Raise `UserError` for arguments out of range; returns (FROM, TO) of --map-path."""
    if not 1 <= args.k <= MAX_RESULTS:
        raise UserError(f"--k: expected 1 to {MAX_RESULTS:,}, found {args.k}")
    if not 0 <= args.not_weight < float("inf"):
        raise UserError(f"--not-weight: expected 0 or more, found {args.not_weight}")
    if any(not text.strip() for text in [*args.query, *args.unwanted]):
        raise UserError("expected a text to search for, found an empty one")
    if args.map_path is None:
        return None
    start, equals, target = args.map_path.partition("=")
    if not (start and equals and target):
        raise UserError(f"--map-path: expected FROM=TO, found {args.map_path!r}")
    return start, target


def serve_page(args: argparse.Namespace, mapping: tuple[str, str] | None) -> None:
    """The web page and its API until a signal comes; the model is loaded meanwhile."""
    from music_library.serving import serve  # here, as the web framework is of no use to the other commands

    asked = {"QUERY": args.query, "--queries": args.queries, "--like": args.like, "--not": args.unwanted}
    asked |= {"--json": args.json, "--playlist": args.playlist, "--moments": args.moments}
    if given := [name for name, value in asked.items() if value]:
        raise UserError(f"--serve: expected no {' and no '.join(given)}; what to search for is asked on the page")
    if not 0 <= args.port <= 65_535:
        raise UserError(f"--port: expected 0 to 65,535, found {args.port}")
    opened = partial(
        open_searcher, args.checkpoint, args.milvus_uri, args.milvus_token, args.device, mapping, args.vectors_dir,
        args.precision,
    )  # fmt: skip
    serve(opened, args.host, args.port)


def read_queries(name: str) -> list[str]:
    """The lines of a file, or of stdin for "-"; blank ones are left out."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name}: expected a text file with a query a line, found: {reason}") from error
    queries = [line.strip() for line in text.removeprefix(BYTE_ORDER_MARK).splitlines() if line.strip()]
    if not queries:
        raise UserError(f"{name}: expected a query a line, found none")
    return queries


def answer(searcher: Searcher, queries: list[str], args: argparse.Namespace) -> list[list[Hit]]:
    """What is found for --like, where it is given, and for each query."""
    answers = []
    if args.like:
        track = searcher.track_of(args.like) or args.like
        answers.append(searcher.like(track, args.k))
    if queries:
        vectors = searcher.embed(queries)
        if args.unwanted:
            vectors = without(vectors, searcher.embed(args.unwanted).sum(axis=0), args.not_weight)
        answers += searcher.find(vectors, args.k, moments=args.moments)
    return answers


if __name__ == "__main__":
    run_script(main)
