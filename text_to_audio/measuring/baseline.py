"""Ridge regression from the frozen text encoder into the audio space, in closed form: what training has to beat."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

from common.errors import UserError
from text_to_audio.loading.captions import CaptionSet
from text_to_audio.loading.tokens import TokenCache
from text_to_audio.loading.vectors import AudioVectors
from text_to_audio.measuring.evaluation import Evaluator, caption_scores, embed_captions, gallery_metrics
from text_to_audio.model.head import ProjectionHead
from text_to_audio.model.text_encoder import TextEncoder
from text_to_audio.processes import ALONE, Processes

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # times the mean eigenvalue; the best on the validation split is taken
_ALIKE = 1e-5  # of the embeddings' length: what rounding leaves between texts that give the same tokens
_TILE_ELEMENTS = 1 << 25  # audio elements in hand at once: 128 MB in float32


@dataclass(frozen=True)
class RidgeProjection:
    """A ridge regression in the place of the trained head, in the eigenbasis of the texts' covariance.

    text_mean: (text_dim,). basis: (text_dim, text_dim) eigenvectors. eigenvalues: (text_dim,). cross: (text_dim,
    audio_dim) products of rotated texts and audio. audio_mean: (audio_dim,). penalty: added to each eigenvalue.
    """

    text_mean: Tensor
    basis: Tensor
    eigenvalues: Tensor
    cross: Tensor
    audio_mean: Tensor
    head: ProjectionHead
    penalty: float = 1.0

    @property
    def audio_dim(self) -> int:
        """Width of the audio space."""
        return self.cross.shape[1]

    def project_text(self, text: Tensor) -> Tensor:
        """Sentence embeddings (batch, text_dim) -> unit vectors (batch, audio_dim) in the standardised space."""
        rotated = (text.to(self.cross) - self.text_mean) @ self.basis
        return F.normalize(rotated / (self.eigenvalues + self.penalty) @ self.cross + self.audio_mean, dim=-1)

    def standardise_audio(self, audio: Tensor) -> Tensor:
        """Stored audio vectors -> unit vectors in the standardised space, as the head has them."""
        return self.head.standardise_audio(audio)


@torch.no_grad()
def fit_ridge(text: Tensor, captions: CaptionSet, vectors: AudioVectors, head: ProjectionHead) -> RidgeProjection:
    """Fit embeddings of the captions, (captions, text_dim), to their recordings' standardised vectors.

    Solved in text_dim; the recordings go by in tiles, so that at 76,800 dimensions nothing but `cross` is wide. Raises
    `UserError` for texts that are all alike, which nothing can be told from.
    """
    mean = text.double().mean(0)
    centred = text.double() - mean
    if len(set(captions.captions)) == 1 or centred.norm(dim=1).max() <= _ALIKE * mean.norm():
        raise UserError(
            f"--baseline: expected captions that differ, found {len(text):,} in the train split that are all alike to "
            f"the text encoder, such as {captions.captions[0][:60]!r}; leave --baseline out, or mend the captions"
        )
    eigenvalues, basis = torch.linalg.eigh(centred.T @ centred)
    device, kind = head.mean.device, head.mean.dtype
    rows = torch.from_numpy(captions.caption_audio)
    by_recording = torch.zeros(len(vectors), text.shape[1]).index_add_(0, rows, (centred @ basis).float())
    count = torch.bincount(rows, minlength=len(vectors)).to(device, kind)
    cross = torch.zeros(text.shape[1], vectors.dim, device=device, dtype=kind)
    audio_mean = torch.zeros(vectors.dim, device=device, dtype=kind)
    step = max(1, _TILE_ELEMENTS // vectors.dim)
    for start in range(0, len(vectors), step):
        audio = head.standardise_audio(vectors.block(start, start + step))
        cross.addmm_(by_recording[start : start + step].to(audio).T, audio)
        audio_mean += count[start : start + step] @ audio / len(text)
    text_mean, basis, eigenvalues = (each.to(device, kind) for each in (mean, basis, eigenvalues.clamp_min(0)))
    return RidgeProjection(text_mean, basis, eigenvalues, cross, audio_mean, head)


@contextmanager
def _frozen(text_encoder: TextEncoder) -> Iterator[None]:
    """The text encoder without LoRA and dropout, for a while."""
    training = text_encoder.training
    text_encoder.eval()
    with cast(PeftModel, text_encoder.model).disable_adapter():
        yield
    text_encoder.train(training)


def embed_frozen(text_encoder: TextEncoder, tokens: Iterable[TokenCache], processes: Processes = ALONE) -> list[Tensor]:
    """Embeddings (captions, text_dim) of each of these sets of captions by the text encoder as it was before LoRA."""
    with _frozen(text_encoder):
        return [embed_captions(text_encoder, each, processes) for each in tokens]


def ridge_metrics(
    texts: Sequence[Tensor],
    head: ProjectionHead,
    captions: CaptionSet,
    vectors: AudioVectors,
    validation: Evaluator,
    test: Evaluator,
) -> tuple[dict[str, float], float]:
    """Test metrics of a ridge regression on the train split's captions and vectors, and the penalty that was taken.

    texts: what `embed_frozen` gives for the captions of train, validation and test. Costs a matrix (text_dim,
    audio_dim).
    """
    ridge = fit_ridge(texts[0], captions, vectors, head)
    text_of = {validation: texts[1], test: texts[2]}

    def metrics(evaluator: Evaluator, penalty: float) -> dict[str, float]:
        chosen = replace(ridge, penalty=penalty * ridge.eigenvalues.mean().item())
        scores = caption_scores(text_of[evaluator], chosen, evaluator.vectors, evaluator.gallery.rows)
        return gallery_metrics(scores, evaluator.gallery)

    best = max(PENALTIES, key=lambda penalty: metrics(validation, penalty)["t2a_MRR"])
    return metrics(test, best), best
