from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.errors import UserError
from helpers.stores import make_header, make_splits, make_vectors
from helpers.tiny_text_models import make_bert
from store.reading import EmbeddingStore
from store.writing import write_store
from text_to_audio.config import TrainingConfig
from text_to_audio.loading.captions import CaptionSet
from text_to_audio.loading.tokens import TokenCache
from text_to_audio.loading.vectors import AudioVectors
from text_to_audio.measuring import baseline
from text_to_audio.measuring.baseline import embed_frozen, fit_ridge, ridge_metrics
from text_to_audio.measuring.evaluation import Evaluator
from text_to_audio.measuring.metrics import retrieval_metrics
from text_to_audio.model.head import ProjectionHead
from text_to_audio.model.text_encoder import TextEncoder


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baseline")
    header, splits = make_header("float16"), make_splits((30, 8, 9))
    for split in splits.values():
        split.caption = [
            f"{['calm', 'happy', 'slow', 'fast'][i % 4]} piano {i % 40} song" for i in range(len(split.caption))
        ]
    write_store(folder / "e.h5", header, splits, make_vectors(header, splits))
    config = TrainingConfig("muq", text_model=make_bert(folder / "bert"), device="cpu", batch_size=5)
    torch.manual_seed(0)
    encoder = TextEncoder(config)
    store = EmbeddingStore(folder / "e.h5")
    head = ProjectionHead(encoder.dim, 16, 6)
    head.set_statistics(*store.statistics("muq"), "zscore")
    captions = CaptionSet.of(store.split("train"))
    return config, encoder, store, head, captions, AudioVectors(store, "train", "muq")


@pytest.mark.parametrize("elements", [6, 13 * 6, 1 << 25])
@pytest.mark.parametrize("penalty", [0.01, 3.0])
def test_against_solving_the_normal_equations(parts, elements, penalty, monkeypatch):
    monkeypatch.setattr(baseline, "_TILE_ELEMENTS", elements)
    _, _, _, head, captions, vectors = parts
    generator = torch.Generator().manual_seed(1)
    text, queries = torch.randn(60, 11, generator=generator) + 2, torch.randn(4, 11, generator=generator) + 2
    ridge = baseline.replace(fit_ridge(text, captions, vectors, head), penalty=penalty)
    x = text.double().numpy()
    y = head.standardise_audio(vectors[captions.caption_audio]).double().numpy()
    mean_x, mean_y = x.mean(0), y.mean(0)
    weight = np.linalg.solve((x - mean_x).T @ (x - mean_x) + penalty * np.eye(11), (x - mean_x).T @ (y - mean_y))
    expected = F.normalize(torch.from_numpy((queries.double().numpy() - mean_x) @ weight + mean_y), dim=1)
    torch.testing.assert_close(ridge.project_text(queries).double(), expected, atol=2e-5, rtol=0)


def test_it_is_the_frozen_encoder_s_and_leaves_it_as_it_was(parts):
    config, encoder, store, head, captions, vectors = parts
    tokens = TokenCache(encoder, captions.captions)
    evaluators = [Evaluator(encoder, store, split, config) for split in ("val", "test")]
    caches = [tokens, *(each.tokens for each in evaluators)]

    def found():
        return ridge_metrics(embed_frozen(encoder, caches), head, captions, vectors, *evaluators)

    before, penalty = found()
    assert penalty in baseline.PENALTIES
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    trained = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    encoder.train()
    assert found() == (before, penalty)
    assert encoder.training
    assert [name for name, parameter in encoder.named_parameters() if parameter.requires_grad] == trained
    adapted = baseline.embed_captions(encoder.eval(), tokens)
    with encoder.model.disable_adapter():
        assert (adapted - baseline.embed_captions(encoder, tokens)).abs().max() > 0.01  # LoRA did something
    gallery = evaluators[1].gallery
    some = retrieval_metrics(torch.rand(len(gallery.captions), 9), torch.from_numpy(gallery.captions.caption_audio))
    assert before.keys() == some.keys()


@pytest.mark.parametrize("texts", [["calm piano"] * 60, [f"calm{' ' * i} piano" for i in range(60)]])
def test_texts_that_are_all_alike_are_said_to_be(parts, texts):
    _, encoder, _, head, captions, vectors = parts
    alike = replace(captions, captions=texts)
    (text,) = embed_frozen(encoder, [TokenCache(encoder, texts)])
    with pytest.raises(UserError, match=r"--baseline: expected captions that differ, found 60 .* all alike"):
        fit_ridge(text, alike, vectors, head)
