"""Recall as a user of the index meets it: the captions of a stored split asked of a real Milvus index."""

import numpy as np

from music_library.index_space import IndexSpace
from music_library.milvus_index import FIELD, Found, IndexChoice, VectorDatabase
from text_to_audio.measuring.evaluation import Gallery
from text_to_audio.measuring.metrics import RECALL_AT

_AT_ONCE = 256


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
