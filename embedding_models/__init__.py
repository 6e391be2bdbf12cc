"""The three frozen audio encoders, and how their frames become one vector per clip or track."""

from embedding_models.audio import AudioError
from embedding_models.enrichment import enrich
from embedding_models.latent import MusicLatentSpaceModel
from embedding_models.mert import MertModel
from embedding_models.muq import MuQEmbeddingModel

__all__ = ["AudioError", "MertModel", "MuQEmbeddingModel", "MusicLatentSpaceModel", "enrich"]
