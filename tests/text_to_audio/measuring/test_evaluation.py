import numpy as np
import pytest
import torch

from common.errors import UserError
from helpers.losses import symmetric_loss
from helpers.stores import make_header, make_splits, make_vectors
from helpers.tiny_text_models import make_bert
from store.reading import EmbeddingStore, Split
from store.writing import write_store
from text_to_audio.config import TrainingConfig
from text_to_audio.measuring import evaluation
from text_to_audio.measuring.evaluation import (
    Evaluator,
    by_subset,
    caption_scores,
    gallery_loss,
    gallery_metrics,
    make_gallery,
)
from text_to_audio.measuring.metrics import retrieval_metrics
from text_to_audio.model.head import ProjectionHead
from text_to_audio.model.text_encoder import TextEncoder


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    header, splits = make_header("float16"), make_splits((7, 9, 4))
    vectors = make_vectors(header, splits)
    write_store(folder / "e.h5", header, splits, vectors)
    config = TrainingConfig(
        "muq", text_model=make_bert(folder / "bert"), device="cpu", batch_size=3, gradient_accumulation_steps=2
    )
    torch.manual_seed(0)
    encoder = TextEncoder(config)
    head = ProjectionHead(encoder.dim, 16, 6)
    store = EmbeddingStore(folder / "e.h5")
    head.set_statistics(*store.statistics("muq"), "zscore")
    return config, encoder, head, store


def test_validation_has_one_recording_per_source_the_unaugmented_if_any():
    ids = ["data_aug2/aaaaaaaaaaa_3.wav", "data/aaaaaaaaaaa.wav", "data_aug2/bbbbbbbbbbb_7.wav",
           "data_aug2/bbbbbbbbbbb_0.wav", "data_aug2/ccccccccccc_9.wav", "data_aug2/ccccccccccc_2.wav"]  # fmt: skip
    sources = [name.split("/")[1][:11] for name in ids]
    texts = [f"{name} {kind}" for name in ids for kind in ("main", "alt")]
    split = Split(ids, sources, texts, np.repeat(np.arange(6), 2), ["main", "alt"] * 6)
    gallery = make_gallery(split, one_per_source=True)
    assert gallery.rows.tolist() == [1, 3, 4]
    assert gallery.captions.captions == [texts[i] for i in (2, 3, 6, 7, 8, 9)]
    assert gallery.captions.caption_audio.tolist() == [0, 0, 1, 1, 2, 2]
    assert gallery.subsets == {}
    assert len(make_gallery(split, one_per_source=False)) == 6


def test_repeated_captions_count_once_and_subsets_have_their_own():
    texts = ["p", "q", "p", "q in C", "p", "r", "p", "s"]
    kinds = ["A/main", "A/alt", "B/main", "B/alt"] * 2
    split = Split(["x", "y"], ["x", "y"], texts, np.repeat([0, 1], 4), kinds)
    gallery = make_gallery(split, one_per_source=False)
    assert gallery.captions.captions == ["p", "q", "q in C", "p", "r", "s"]  # "p" of both recordings, once each
    assert gallery.captions.caption_audio.tolist() == [0, 0, 0, 1, 1, 1]
    assert {name: members.tolist() for name, members in gallery.subsets.items()} == {
        "A": [0, 1, 3, 4],
        "B": [0, 2, 3, 5],
    }
    scores = torch.rand(6, 2)
    found = gallery_metrics(scores, gallery)
    part = torch.tensor([0, 2, 3, 5])
    alone = retrieval_metrics(scores[part], torch.tensor([0, 0, 1, 1]))
    assert {key[2:]: value for key, value in found.items() if key.startswith("B/")} == alone
    rows = by_subset({**found, "gallery": 2}, "muq")
    assert list(rows) == ["muq", "muq A", "muq B"]
    assert rows["muq B"] == {**alone, "gallery": 2}


@pytest.mark.parametrize("elements", [1, 13, 1 << 25])
def test_scores_do_not_depend_on_the_tiles(setting, elements, monkeypatch):
    config, encoder, head, store = setting
    evaluator = Evaluator(encoder, store, "val", config)
    monkeypatch.setattr(evaluation, "_TILE_ELEMENTS", elements)
    found = evaluator.scores(evaluator.embed(encoder), head)
    encoder.eval(), head.eval()
    with torch.no_grad():
        text, audio = head(encoder(evaluator.gallery.captions.captions), evaluator.vectors[evaluator.gallery.rows])
    torch.testing.assert_close(found, text @ audio.T, atol=1e-5, rtol=0)


def test_measuring_leaves_the_modes_as_they_were(setting):
    config, encoder, head, store = setting
    evaluator = Evaluator(encoder, store, "val", config)
    for mode in (True, False):
        encoder.train(mode), head.train(mode)
        first, second = (evaluator.measure(encoder, head) for _ in range(2))
        assert first == second  # no dropout, the same batches
        assert encoder.training is head.training is mode


@pytest.mark.parametrize("negatives", ["micro", "batch"])
def test_validation_loss_is_the_training_loss(setting, negatives):
    config, encoder, head, store = setting
    config = TrainingConfig(**{**config.as_dict(), "audio_negatives": negatives, "device": "cpu"})
    evaluator = Evaluator(encoder, store, "val", config)
    scores = evaluator.scores(evaluator.embed(encoder), head)
    captions, lengths = evaluator.gallery.captions, evaluator.tokens.lengths
    total = 0.0
    with torch.no_grad():
        text, audio = head(encoder(captions.captions), evaluator.vectors[evaluator.gallery.rows])
    for batch in evaluation.plan_epoch(captions.caption_source, 6, 0, 0):
        for part in evaluation.micro_batches(batch, lengths, 3):
            own_audio = audio[captions.caption_audio[batch]]
            seen, own = (own_audio, part) if negatives == "batch" else (own_audio[part], np.arange(len(part)))
            loss = symmetric_loss(text[batch[part]] @ seen.T, torch.from_numpy(own), 0.07)
            total += len(part) / len(captions) * loss.item()
    assert gallery_loss(scores, evaluator.gallery, lengths, config, 0.07) == pytest.approx(total, rel=1e-4)


def test_scores_that_are_not_finite(setting):
    config, encoder, _, store = setting
    evaluator = Evaluator(encoder, store, "val", config)
    head = ProjectionHead(encoder.dim, 16, 6)
    torch.nn.init.constant_(head.layers[0].weight, torch.nan)
    with pytest.raises(UserError, match="the training has diverged"):
        evaluator.measure(encoder, head)


def test_empty_split(setting, tmp_path):
    config, encoder, _, _ = setting
    header, splits = make_header(), make_splits((4, 3, 0))
    write_store(tmp_path / "e.h5", header, splits, make_vectors(header, splits))
    with pytest.raises(UserError, match="captions in the split 'test', found none"):
        Evaluator(encoder, EmbeddingStore(tmp_path / "e.h5"), "test", config)


def test_caption_scores_shape(setting):
    _, encoder, head, store = setting
    vectors = evaluation.AudioVectors(store, "val", "muq")
    assert caption_scores(torch.randn(5, encoder.dim), head, vectors, np.arange(4)).shape == (5, 4)
