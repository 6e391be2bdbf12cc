"""What retrieval is measured on: galleries of unique recordings, scores of captions against them, the metrics."""

from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from store.reading import EmbeddingStore, Split
from text_to_audio.config import TrainingConfig
from text_to_audio.loading.batches import micro_batches, plan_epoch
from text_to_audio.loading.captions import CaptionSet, source_numbers
from text_to_audio.loading.tokens import TokenCache
from text_to_audio.loading.vectors import AudioVectors
from text_to_audio.loss.objective import Scores, contrastive_objective, together
from text_to_audio.measuring.metrics import retrieval_metrics, text_to_audio_ranks
from text_to_audio.model.head import Projection, ProjectionHead
from text_to_audio.model.text_encoder import TextEncoder, token_batches
from text_to_audio.processes import ALONE, Processes

_TILE_ELEMENTS = 1 << 25  # float32 elements of text or audio in hand at once: 128 MB


@dataclass(frozen=True)
class Gallery:
    """Recordings to be found and the captions that ask for them.

    rows: (N,) rows of the recordings in their split. source: (N,) a number per source. captions: C captions, whose
    `caption_audio` counts within `rows`; no text stands twice for one recording. subsets: name -> (n,) captions that
    are also reported alone.
    """

    rows: np.ndarray
    source: np.ndarray
    captions: CaptionSet
    subsets: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.rows)


def make_gallery(split: Split, one_per_source: bool) -> Gallery:
    """The gallery of a split; subsets come from caption kinds such as "A/main" (the part before the slash)."""
    rows = _one_per_source(split) if one_per_source else np.arange(len(split.audio_id))
    kept = split.take(rows)
    first: dict[tuple[int, str], int] = {}
    members: dict[str, list[int]] = {}
    for i, (audio, text) in enumerate(zip(kept.caption_audio.tolist(), kept.caption, strict=True)):
        number = first.setdefault((audio, text), len(first))
        subset, slash, _ = kept.caption_kind[i].partition("/")
        if slash:
            members.setdefault(subset, []).append(number)
    source = source_numbers(kept)
    audio = np.array([audio for audio, _ in first], np.int64)
    captions = CaptionSet([text for _, text in first], audio, source[audio])
    return Gallery(rows, source, captions, {name: np.unique(members[name]) for name in sorted(members)})


def _one_per_source(split: Split) -> np.ndarray:
    """The row of each source's unaugmented recording (its stem is the source id, or the copy `_0`), else its first.

    Copies of one clip cannot be told apart by a caption, so only one of them is in the gallery.
    """
    best: dict[str, tuple[int, int]] = {}
    for row, (audio_id, source) in enumerate(zip(split.audio_id, split.source_id, strict=True)):
        stem = PurePosixPath(audio_id).stem
        order = {source: 0, f"{source}_0": 1}.get(stem, 2)
        best[source] = min(best.get(source, (order, row)), (order, row))
    return np.array(sorted(row for _, row in best.values()), np.int64)


def split_gallery(store: EmbeddingStore, split: str) -> Gallery:
    """The gallery a split is measured on: in validation one recording per source. `UserError` where it is empty."""
    gallery = make_gallery(store.split(split), one_per_source=split == "val")
    if not len(gallery.captions):
        raise UserError(f"{store.path}: expected recordings with captions in the split {split!r}, found none")
    return gallery


@torch.no_grad()
def embed_captions(text_encoder: TextEncoder, tokens: TokenCache, processes: Processes = ALONE) -> Tensor:
    """Sentence embeddings of every cached caption in order, (captions, text_dim) float32 on the CPU.

    The processes share the work, and all have the whole.
    """
    embeddings = torch.zeros(len(tokens.lengths), text_encoder.dim)
    before: tuple[np.ndarray, Tensor] | None = None
    for part in [*processes.own(token_batches(tokens.lengths)), None]:
        now = None if part is None else (part, text_encoder.encode(tokens.padded(part)))
        if before is not None:  # its copy waits for the device, which has the next batch to do meanwhile
            embeddings[before[0]] = before[1].cpu().to(embeddings.dtype)
        before = now
    processes.sum([embeddings])
    return embeddings


@torch.no_grad()
def caption_scores(
    text: Tensor,
    projection: Projection,
    vectors: AudioVectors,
    rows: np.ndarray,
    processes: Processes = ALONE,
) -> Tensor:
    """Cosines of captions and recordings, (captions, recordings) float32 on the CPU.

    text: (captions, text_dim) sentence embeddings. Neither side is projected or standardised whole: at 76,800
    dimensions that would be gigabytes, so that both go through in tiles. The processes share the tiles of captions.
    """
    step = max(1, _TILE_ELEMENTS // projection.audio_dim)
    own_step = max(1, min(step, -(-len(text) // processes.count)))
    scores = torch.zeros(len(text), len(rows))
    for i in processes.own(range(0, len(text), own_step)):
        features = projection.project_text(text[i : i + own_step])
        for j in range(0, len(rows), step):
            audio = projection.standardise_audio(vectors[rows[j : j + step]])
            scores[i : i + own_step, j : j + step] = (features @ audio.T).cpu()
    processes.sum([scores])
    return scores


def gallery_metrics(scores: Tensor, gallery: Gallery) -> dict[str, float]:
    """Metrics over all captions, and those of each subset as "A/t2a_R@1"; `UserError` for scores not finite."""
    if not torch.isfinite(scores).all():
        raise UserError("expected finite scores, found nan or infinity: the training has diverged; lower --lr")
    audio = torch.from_numpy(gallery.captions.caption_audio)
    metrics = retrieval_metrics(scores, audio)
    for name, members in gallery.subsets.items():
        part = torch.from_numpy(members)
        metrics |= {f"{name}/{key}": value for key, value in retrieval_metrics(scores[part], audio[part]).items()}
    return metrics


def gallery_loss(
    scores: Tensor, gallery: Gallery, lengths: np.ndarray, config: TrainingConfig, temperature: float
) -> float:
    """The training objective over the gallery's captions, in batches that are the same at every call.

    It is taken from the scores that the metrics need anyway, so that no text is run twice. The bank of training is
    here the gallery, and there is no text queue.
    """
    captions, total = gallery.captions, 0.0
    for batch in plan_epoch(captions.caption_source, config.effective_batch_size, seed=0, epoch=0):
        every = list(micro_batches(batch, lengths, config.batch_size))
        for numbers in together(every, config):
            parts = [every[number] for number in numbers]
            compared = Scores(scores, captions.caption_audio, gallery.source, batch, parts)
            total += sum(map(len, parts)) * contrastive_objective(compared, parts, temperature, config).item()
    return total / len(captions)


class Evaluator:
    """Measures a text encoder and head on one split; tokens are made once, or are another evaluator's of the split.

    The processes share the work and all return the same.
    """

    def __init__(
        self,
        text_encoder: TextEncoder,
        store: EmbeddingStore,
        split: str,
        config: TrainingConfig,
        processes: Processes = ALONE,
        tokens: TokenCache | None = None,
    ):
        self.config, self.processes = config, processes
        self.gallery = split_gallery(store, split)
        self.tokens = tokens or TokenCache(text_encoder, self.gallery.captions.captions)
        self.vectors = AudioVectors(store, split, config.audio_encoder)
        audio_id = store.split(split).audio_id
        self.audio_id = [audio_id[row] for row in self.gallery.rows]
        self.latest: Tensor | None = None  # the scores of the last `measure`, for whoever shows examples of them

    def embed(self, text_encoder: TextEncoder) -> Tensor:
        """Sentence embeddings of the gallery's captions in evaluation mode; the mode is put back."""
        training = text_encoder.training
        text_encoder.eval()
        text = embed_captions(text_encoder, self.tokens, self.processes)
        text_encoder.train(training)
        return text

    def scores(self, text: Tensor, projection: ProjectionHead) -> Tensor:
        """Cosines (captions, recordings) of sentence embeddings in evaluation mode; the mode is put back."""
        training = projection.training
        projection.eval()
        scores = caption_scores(text, projection, self.vectors, self.gallery.rows, self.processes)
        projection.train(training)
        return scores

    def measure(
        self,
        text_encoder: TextEncoder,
        projection: ProjectionHead,
        temperature: float | None = None,
        text: Tensor | None = None,
    ) -> dict[str, float]:
        """The metrics of the split, and "loss", the training loss over fixed batches.

        temperature: where it is learnt, what it is by now; None is the config's, in its space. text: what `embed` gave,
        where the same captions are measured in several spaces.
        """
        text = self.embed(text_encoder) if text is None else text
        self.latest = scores = self.scores(text, projection)
        metrics = gallery_metrics(scores, self.gallery)
        temperature = temperature or self.config.scaled_temperature
        loss = gallery_loss(scores, self.gallery, self.tokens.lengths, self.config, temperature)
        return {**metrics, "loss": loss}

    def hits(self) -> Tensor:
        """Which captions found their recording first in the last measurement, (captions,) bool."""
        if self.latest is None:
            raise ValueError("the evaluator has not measured anything yet")
        return text_to_audio_ranks(self.latest, torch.from_numpy(self.gallery.captions.caption_audio)) == 1


def by_subset(metrics: dict[str, float], name: str) -> dict[str, dict[str, float]]:
    """Metrics with names such as "A/t2a_R@1" as one entry per subset; those without a subset come first, as `name`.

    The subsets share the recordings, so each entry has the `gallery` size of the whole.
    """
    rows: dict[str, dict[str, float]] = {name: {}}
    for key, value in metrics.items():
        subset, slash, metric = key.rpartition("/")
        rows.setdefault(f"{name} {subset}" if slash else name, {})[metric] = value
    return {row: {**entry, "gallery": metrics["gallery"]} for row, entry in rows.items()}
