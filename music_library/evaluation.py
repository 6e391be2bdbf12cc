"""Recall as a user of the index meets it: of a stored split's captions, and of the neighbours of what is indexed."""

from dataclasses import dataclass

import numpy as np

from music_library.index_space import IndexSpace
from music_library.milvus_index import FIELD, INDEX_TYPES, Found, IndexChoice, VectorDatabase
from music_library.vector_files import VectorFiles
from text_to_audio.measuring.evaluation import Gallery
from text_to_audio.measuring.metrics import RECALL_AT

_AT_ONCE = 256
NEIGHBOURS = 10
ENOUGH = 0.95  # share of the exact neighbours that an index should find
_SAMPLED = 300


@dataclass(frozen=True)
class Probing:
    """How an IVF_FLAT index does: the share of the exact neighbours that it finds with its own `nprobe` of `lists`.

    needed: the fewest lists, by doubling, that find `ENOUGH`; share_of_needed: what they find.
    """

    nprobe: int
    share: float
    needed: int
    share_of_needed: float
    lists: int


def sampled(files: VectorFiles, windows: bool) -> tuple[list[int], np.ndarray]:
    """Ids and plain vectors (n, dim) of a few hundred tracks or windows of a library, drawn at random."""
    if windows:
        rows = [(each.row, each.row) for each in files.windows_of()]
    else:
        rows = [(each.id, each.row) for each in files.tracks()]
    drawn = np.random.default_rng(0).permutation(len(rows))[:_SAMPLED]
    source = files.windows if windows else files.vectors
    return [rows[i][0] for i in drawn], source[[rows[i][1] for i in drawn]]


def probing(database: VectorDatabase, name: str, vectors: np.ndarray, ids: list[int]) -> Probing:
    """Compare an IVF_FLAT index with an exact search, for which all of its lists are probed.

    vectors: (n, dim) what the collection holds of these ids; a row is no neighbour of itself.
    """
    lists, identity = database.lists(name), database.identity(name) or {}
    own = min(lists, int(identity.get("search_params", {}).get("nprobe", INDEX_TYPES["IVF_FLAT"][1]["nprobe"])))
    exact = _nearest(database, name, vectors, ids, lists)
    tried, share, own_share = own, 0.0, -1.0
    while True:
        found = exact if tried >= lists else _nearest(database, name, vectors, ids, tried)
        share = sum(len(a & b) for a, b in zip(found, exact, strict=True)) / max(1, sum(map(len, exact)))
        own_share = share if own_share < 0 else own_share
        if share >= ENOUGH or tried >= lists:
            return Probing(own, own_share, tried, share, lists)
        tried = min(lists, 2 * tried)


def _nearest(database: VectorDatabase, name: str, vectors: np.ndarray, ids: list[int], nprobe: int) -> list[set[int]]:
    answers = []
    for start in range(0, len(vectors), _AT_ONCE):
        part = vectors[start : start + _AT_ONCE]
        answers += database.search(name, part, NEIGHBOURS + 1, [], {"nprobe": nprobe})
    return [{hit.id for hit in hits if hit.id != own} for hits, own in zip(answers, ids, strict=True)]


def index_gallery(
    database: VectorDatabase, name: str, space: IndexSpace, index: IndexChoice, plain: np.ndarray, gallery: Gallery
) -> None:
    """Make the collection `name` anew from a gallery's recordings and wait for its index.

    plain: (rows of the split, audio_dim) stored vectors. A recording's id is its place in the gallery.
    """
    database.drop(name)
    database.create(name, space.dim, index, {**space.identity, "index_type": index.kind})
    for start in range(0, len(gallery), _AT_ONCE):
        rows = gallery.rows[start : start + _AT_ONCE]
        vectors = space.audio(plain[rows])
        database.upsert(name, [_row(start + i, vector) for i, vector in enumerate(vectors)])
    database.build(name, index)


def _row(number: int, vector: np.ndarray) -> dict:
    texts = dict.fromkeys(("path", "title", "artist", "album"), "")
    return {"id": number, FIELD: vector, "version": 0, "duration": 0.0, **texts}


def milvus_recall(
    database: VectorDatabase, name: str, space: IndexSpace, index: IndexChoice, texts: np.ndarray, wanted: np.ndarray
) -> dict[str, float]:
    """Text -> audio recall in percent, "t2a_R@1" and so on, of the index.

    texts: (captions, audio_dim) unit vectors; wanted: (captions,) each one's recording. A tie counts against the
    system.
    """
    ranks = []
    for start in range(0, len(texts), _AT_ONCE):
        queries = space.queries(texts[start : start + _AT_ONCE])
        answers = database.search(name, queries, max(RECALL_AT), [], index.search_params)
        ranks += [_rank(hits, number) for hits, number in zip(answers, wanted[start : start + _AT_ONCE], strict=True)]
    return {f"t2a_R@{k}": 100 * float(np.mean([rank <= k for rank in ranks])) for k in RECALL_AT}


def _rank(hits: list[Found], number: int) -> float:
    own = next((hit.score for hit in hits if hit.id == number), None)
    return float("inf") if own is None else sum(hit.score >= own for hit in hits)
