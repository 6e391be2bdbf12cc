"""What single queries found: the best and the worst of a measured split, with the recordings that came first."""

from dataclasses import dataclass

import torch
from torch import Tensor

from text_to_audio.measuring.evaluation import Gallery
from text_to_audio.measuring.metrics import text_to_audio_ranks


@dataclass(frozen=True)
class Found:
    """A recording among the first for a query: its id, its cosine with the query, its first caption."""

    audio_id: str
    score: float
    caption: str


@dataclass(frozen=True)
class Query:
    """A caption used as a query, the recording it belongs to, that recording's rank from 1, and what came first."""

    caption: str
    audio_id: str
    rank: int
    found: list[Found]


def best_and_worst(
    scores: Tensor, gallery: Gallery, audio_id: list[str], count: int = 5, top: int = 3
) -> tuple[list[Query], list[Query]]:
    """The `count` queries of lowest rank, best first, and those of highest rank, worst first; no query is in both.

    scores: (captions, recordings). audio_id: the gallery's recordings. Among equal ranks the margin decides: the
    own recording's cosine less the best other one's.
    """
    own = torch.from_numpy(gallery.captions.caption_audio)
    ranks = text_to_audio_ranks(scores, own)
    others = scores.scatter(1, own[:, None], -torch.inf).amax(1)
    margin = scores.gather(1, own[:, None])[:, 0] - others
    order = sorted(range(len(ranks)), key=lambda i: (ranks[i].item(), -margin[i].item()))
    first_caption: dict[int, str] = {}
    for row, text in zip(own.tolist(), gallery.captions.captions, strict=True):
        first_caption.setdefault(row, text)

    def query(i: int) -> Query:
        best = scores[i].topk(min(top, scores.shape[1]))
        found = [
            Found(audio_id[row], score, first_caption.get(row, ""))
            for score, row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        return Query(gallery.captions.captions[i], audio_id[own[i]], int(ranks[i]), found)

    best, rest = order[:count], order[count:]
    return [query(i) for i in best], [query(i) for i in rest[::-1][:count]]


def similarity_counts(scores: Tensor, gallery: Gallery, bins: int = 80) -> tuple[Tensor, Tensor, Tensor]:
    """Histograms of the cosines of captions with their own recording, and with all others.

    scores: (captions, recordings). Returns the edges (bins + 1,) from -1 to 1 and both counts (bins,) int64.
    """
    edges = torch.linspace(-1, 1, bins + 1)
    every = torch.histc(scores.clamp(-1, 1), bins, -1, 1)
    own = scores.gather(1, torch.from_numpy(gallery.captions.caption_audio)[:, None])
    positive = torch.histc(own.clamp(-1, 1), bins, -1, 1)
    return edges, positive.long(), (every - positive).long()
