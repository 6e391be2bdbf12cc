"""The flags that index_library.py and search.py share: whose audio space, where the index and its vectors are."""

import argparse

from music_library.milvus_index import DEFAULT_URI


def add_library_flags(parser: argparse.ArgumentParser, checkpoint: str | None) -> None:
    """Add them; `checkpoint` is the one that is taken where none is named."""
    text = f"a checkpoint of train.py, for its audio space{f' ({checkpoint})' if checkpoint else ''}"
    add = parser.add_argument
    add("--checkpoint", default=checkpoint, metavar="FILE", help=text)
    add("--milvus-uri", default=DEFAULT_URI, help="folder of Milvus Lite, or a server's address (%(default)s)")
    add("--milvus-token", help="token of the server, or user:password")
    add(
        "--vectors-dir",
        metavar="DIR",
        help="where plain vectors are kept (data/library.vectors, of a server data/HOST_PORT.vectors)",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
