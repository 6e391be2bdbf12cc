"""How well a checkpoint finds music of another kind than it was trained on: a store of it, words that name its clips.

Beside the store may lie words.json: {text: {"yes": [clip, ...], "no": [clip, ...]}}, clips by the stem of their
recording's id. Each text is asked for among the clips that are said to have it or not to have it. Else the captions of
the store's test split are asked for among its recordings.
"""

import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from store.reading import SPLITS, EmbeddingStore
from text_to_audio.loading.tokens import TokenCache
from text_to_audio.measuring.evaluation import Gallery, embed_captions
from text_to_audio.measuring.metrics import retrieval_metrics
from text_to_audio.model.head import ProjectionHead
from text_to_audio.model.text_encoder import TextEncoder

TOP = 10
Words = dict[str, tuple[list[int], list[int]]]  # text -> rows of all recordings that have it, and that have not


def read_words(store: EmbeddingStore) -> Words:
    """The texts of words.json beside the store; none where there is no such file. Rows count through all splits."""
    path = Path(store.path).with_name("words.json")
    if not path.exists():
        return {}
    ids = [PurePosixPath(name).stem for split in SPLITS for name in store.split(split).audio_id]
    row_of = {name: row for row, name in enumerate(ids)}
    try:
        return {
            text: ([row_of[each] for each in sides["yes"]], [row_of[each] for each in sides["no"]])
            for text, sides in json.loads(path.read_text(encoding="utf-8")).items()
        }
    except KeyError as error:
        raise UserError(
            f"{path}: expected clips of {store.path} as yes and no of each text; missing {error}"
        ) from error


def store_vectors(store: EmbeddingStore, encoder: str, split: str, width: int | None = None) -> Tensor:
    """The first `width` columns of a split's vectors, (recordings, width) float32; all of them where it is None."""
    return torch.from_numpy(store.vectors(split, encoder)[:, :width].astype(np.float32))


def embed(encoder: TextEncoder, texts: list[str]) -> Tensor:
    """Sentence embeddings (texts, text_dim) by an encoder in evaluation mode; there may be no texts."""
    return embed_captions(encoder, TokenCache(encoder, texts)) if texts else torch.zeros(0, encoder.dim)


def area_under_curve(yes: Tensor, no: Tensor) -> float:
    """Area under the ROC curve: how often a score of `yes` is above one of `no`, ties counting half (Mann-Whitney)."""
    difference = yes[:, None] - no[None]
    return ((difference > 0).double() + 0.5 * (difference == 0).double()).mean().item()


def precision_at_top(yes: Tensor, no: Tensor) -> float:
    """Share of `yes` among the `TOP` highest scores."""
    return (torch.cat([yes, no]).topk(TOP).indices < len(yes)).double().mean().item()


@torch.no_grad()
def transfer_metrics(
    vectors_of: Callable[[str, int], Tensor],
    gallery: Gallery,
    projection: ProjectionHead,
    words: Words,
    word_texts: Tensor,
    captions: Tensor,
) -> dict[str, float]:
    """AUC and P@10 averaged over the words where there are any, else MRR of the test split's captions.

    vectors_of: of a split and a width, its vectors. gallery: of the test split. word_texts: (words, text_dim) sentence
    embeddings of `words`; captions: (captions, text_dim) of the gallery's captions.
    """
    width = projection.audio_dim
    if not words:
        audio = projection.standardise_audio(vectors_of("test", width)[gallery.rows])
        scores = projection.project_text(captions) @ audio.T
        return {"transfer MRR": retrieval_metrics(scores, torch.from_numpy(gallery.captions.caption_audio))["t2a_MRR"]}
    audio = projection.standardise_audio(torch.cat([vectors_of(split, width) for split in SPLITS]))
    scores = projection.project_text(word_texts) @ audio.T
    pairs = [(row[yes], row[no]) for row, (yes, no) in zip(scores, words.values(), strict=True)]
    return {
        "AUC": float(np.mean([area_under_curve(*pair) for pair in pairs])),
        "P@10": float(np.mean([precision_at_top(*pair) for pair in pairs])),
    }
