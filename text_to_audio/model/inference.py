"""A trained checkpoint at work: texts to vectors in its audio space."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.device import choose_device
from text_to_audio.config import TrainingConfig
from text_to_audio.model.checkpoints import read_checkpoint, restore_weights
from text_to_audio.model.head import ProjectionHead
from text_to_audio.model.pretrained import load_pretrained
from text_to_audio.model.text_encoder import TextEncoder, pad_tokens, token_batches


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A trained model. It unpacks as `text_encoder, projection, config`.

    space: what is known of the audio space, {id, revision, dim, sample_rate, recipe}; None where the checkpoint does
    not say. epoch: after which it was saved, and metrics: of validation then; 0 and none where it does not say.
    """

    text_encoder: TextEncoder
    projection: ProjectionHead
    config: TrainingConfig
    space: dict | None
    epoch: int
    metrics: dict[str, float]

    def __iter__(self) -> Iterator:
        return iter((self.text_encoder, self.projection, self.config))


def load_checkpoint(
    path: str | Path, device: str = "auto", contents: dict | None = None, precision: str = ""
) -> LoadedCheckpoint:
    """A checkpoint's text encoder and head, on `device` and in evaluation mode, its config and what else it says.

    A temperature that was learnt stands in the config as it was learnt. contents: what `read_checkpoint` gave, where
    the caller has looked into the file already. precision: of the arithmetic, "bf16" or "fp32"; "" is what the
    checkpoint's config says. On a CPU float32 arithmetic takes weights published in 16 bits as they are.
    Raises `UserError` where the file is missing or no checkpoint, or its text model cannot be loaded.
    """
    path = Path(path)
    contents = read_checkpoint(path) if contents is None else contents
    asked = {"device": device, "compile": "off"}  # the layers are compiled for training alone
    asked |= {"precision": precision} if precision else {}
    config = TrainingConfig.from_dict({**contents["config"], **asked}, str(path))
    config.check()
    text_encoder = TextEncoder(config, load_pretrained(config, for_queries=True))
    projection = ProjectionHead(config.text_dim, config.hidden_dim, config.audio_dim, config.head_dropout)
    restore_weights(path, contents, text_encoder, projection)
    if config.learn_temperature:
        config.temperature = math.exp(contents["log_temperature"]) / config.spread
    return LoadedCheckpoint(
        text_encoder.eval(),
        projection.to(config.torch_device).eval(),
        config,
        contents.get("audio_space"),
        contents.get("epoch", 0),
        contents.get("metrics", {}),
    )


def embed_text_query(query: str, encoder: TextEncoder, projection: ProjectionHead, device: str = "auto") -> np.ndarray:
    """One text as a unit vector (audio_dim,) float32 in the standardised audio space."""
    return embed_texts_batch([query], encoder, projection, device)[0]


@torch.no_grad()
def embed_texts_batch(
    texts: list[str],
    encoder: TextEncoder,
    projection: ProjectionHead,
    device: str = "auto",
    batch_size: int | None = None,
) -> np.ndarray:
    """Texts as unit vectors (texts, audio_dim) float32 in the standardised audio space, computed on `device`
    (auto: CUDA where there is one).

    Encoder and head are moved there and left in evaluation mode. batch_size: texts in one pass at most; None: as many
    as `EMBEDDED_TOKENS` hold.
    """
    where = choose_device(device)
    encoder.to(where).eval()
    projection.to(where).eval()
    vectors = np.empty((len(texts), projection.audio_dim), np.float32)
    rows = encoder.tokenise(texts) if texts else []
    for batch in token_batches(np.array([len(row) for row in rows], np.int64)):
        for part in np.array_split(batch, -(-len(batch) // (batch_size or len(batch)))):
            text = encoder.encode(pad_tokens([rows[i] for i in part], encoder.pad_token))
            vectors[part] = projection.project_text(text).cpu().numpy()
    return vectors
