"""The settings of the objective in whole runs of train.py."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from helpers.stores import make_header, make_splits, make_vectors
from helpers.tiny_text_models import make_bert
from store.writing import write_store
from text_to_audio.loading.batches import micro_batches
from text_to_audio.loading.tokens import drop_sentences
from text_to_audio.loss.bank import build_bank
from text_to_audio.loss.info_nce import contrastive_loss
from text_to_audio.measuring.evaluation import gallery_loss
from text_to_audio.model.inference import load_checkpoint
from text_to_audio.model.temperature import Temperature

QUICK = "--epochs 2 --batch-size 4 --gradient-accumulation-steps 2 --hidden-dim 32 --lr 1e-2 --text-lr 1e-3"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objective")
    header, splits = make_header(), make_splits((20, 6, 6))
    splits["train"].source_id = [f"source-{row // 2}" for row in range(20)]
    splits["test"].source_id = [f"other-{row // 2}" for row in range(6)]
    splits["train"].caption = [f"A calm song {i}. A piano {i}! Is it fast? It is slow {i}" for i in range(40)]
    write_store(folder / "embeddings.h5", header, splits, make_vectors(header, splits))
    make_bert(folder / "bert")
    return folder


@pytest.fixture
def start(parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fixed = ["--audio-encoder", "muq", "--data-path", str(parts / "embeddings.h5"), "--device", "cpu"]
    return lambda *words: [*fixed, "--text-model", str(parts / "bert"), *QUICK.split(), *words]


def prepared(words):
    return train.prepare(
        train.config_from_arguments(train.build_parser().parse_args(words)), train.start_log("t", "t.log")
    )


def test_a_learnt_temperature_moves_is_kept_and_comes_back(start):
    words = start("--learn-temperature", "--text-negatives", "batch", "--audio-negatives", "bank", "--epochs", "3")
    train.main([*words, "--baseline"])
    log = Path("train.log").read_text()
    assert "bank: 20 recordings, 0.00 GB, kept in: device" in log
    assert "muq ridge" in log
    assert log.count("chance of 6") == 2
    events = EventAccumulator("logs/tensorboard/muq")
    events.Reload()
    assert "learning_rate/temperature" in events.Tags()["scalars"]
    last = torch.load("checkpoints/muq_last.pt", weights_only=True)
    learnt = math.exp(last["log_temperature"])
    assert abs(learnt / 0.07 - 1) > 0.01
    encoder, head, config = load_checkpoint("checkpoints/muq_last.pt", "cpu")
    assert config.scaled_temperature == pytest.approx(learnt, rel=1e-12)
    assert last["config"]["temperature"] == 0.07
    run = prepared(words)
    (group,) = [group for group in run.optimizer.param_groups if group["name"] == "temperature"]
    assert (group["weight_decay"], group["lr"] > 0, len(group["params"])) == (0, True, 1)
    measured = train.Evaluator(encoder, run.store, "val", config).measure(encoder, head)["loss"]
    assert measured == pytest.approx(last["metrics"]["loss"], rel=1e-5)  # at the learnt temperature


def test_a_fixed_temperature_stays(start):
    train.main(start())
    last = torch.load("checkpoints/muq_last.pt", weights_only=True)
    assert math.exp(last["log_temperature"]) == pytest.approx(0.07 * last["config"]["spread"], rel=1e-6)
    assert load_checkpoint("checkpoints/muq_last.pt", "cpu").config.temperature == 0.07


def test_the_bounds_of_a_learnt_temperature():
    for value, expected in ((1e-4, 0.01), (7.0, 1.0), (0.3, 0.3)):
        temperature = Temperature(value, learnt=True)
        temperature.keep_in_range()
        assert temperature().item() == pytest.approx(expected)
    fixed = Temperature(7.0, learnt=False)
    fixed.keep_in_range()
    assert fixed().item() == pytest.approx(7.0)


def test_sentences_are_dropped_one_by_one():
    caption = "A calm song at 120.5 bpm. It has a piano!  Is it slow? Yes"
    sentences = ["A calm song at 120.5 bpm.", "It has a piano!", "Is it slow?", "Yes"]
    rng = np.random.default_rng(0)
    assert drop_sentences(caption, 0.0, rng) == " ".join(sentences)
    counts, lengths = np.zeros(4), []
    for _ in range(2000):
        found = drop_sentences(caption, 0.5, rng)
        kept = [sentence for sentence in sentences if sentence in found]
        assert found == " ".join(kept)
        counts += [sentence in kept for sentence in sentences]
        lengths.append(len(kept))
    assert min(lengths) == 1
    expected = 0.5 + 0.5**4 / 4  # where all would go, one of them stays
    assert np.abs(counts / 2000 - expected).max() < 0.05
    assert {drop_sentences("one. two.", 0.99, rng) for _ in range(200)} == {"one.", "two."}
    assert drop_sentences("no sentence", 0.99, rng) == "no sentence"


def test_caption_dropout_shortens_what_is_trained_on_anew_each_step(start):
    reader, batch = prepared(start("--caption-dropout", "0.5")).reader, np.arange(0, 40, 4)
    whole = prepared(start()).reader.read(0, batch)
    assert sum(int(tokens[1].sum()) for tokens in whole.tokens.values()) == whole.token_count[0]
    first, again, other = (reader.read(step, batch) for step in (0, 0, 1))
    assert first.token_count[0] < whole.token_count[0]
    assert np.array_equal(first.captions, batch)
    for number, tokens in first.tokens.items():
        assert torch.equal(again.tokens[number], tokens)
    assert any(not torch.equal(other.tokens[number], tokens) for number, tokens in first.tokens.items())
    steps = [np.arange(i, 40, 4) for i in range(4)]
    for words in (["--num-workers", "0"], ["--num-workers", "3"]):
        ahead = list(prepared(start("--caption-dropout", "0.5", *words)).reader.ahead(7, steps))
        assert [data.captions[0] for data in ahead] == [0, 1, 2, 3]
        for step, data in enumerate(ahead, start=7):
            expected = reader.read(step, data.captions)
            assert all(torch.equal(tokens, expected.tokens[number]) for number, tokens in data.tokens.items())
            assert torch.equal(data.vectors["muq"], expected.vectors["muq"])


@pytest.mark.parametrize("same_source", ["mask", "positive"])
@pytest.mark.parametrize("text_negatives", ["micro", "batch"])
@pytest.mark.parametrize("audio_negatives", ["micro", "batch", "bank"])
def test_validation_loss_follows_the_settings(start, audio_negatives, text_negatives, same_source):
    run = prepared(start("--audio-negatives", audio_negatives, "--text-negatives", text_negatives,
                         "--same-source", same_source, "--label-smoothing", "0.1"))  # fmt: skip
    config, test = run.config, train.Evaluator(run.text_encoder, run.store, "test", run.config)
    gallery, lengths = test.gallery, test.tokens.lengths
    scores = test.scores(test.embed(run.text_encoder), run.spaces[0].projection)
    audio, total = gallery.captions.caption_audio, 0.0
    for batch in train.plan_epoch(gallery.captions.caption_source, 8, 0, 0):
        for i in range(len(batch)):
            (part,) = [p for p in micro_batches(batch, lengths, 4) if i in p]
            texts = batch if text_negatives == "batch" else batch[part]
            seen = {"micro": audio[batch[part]], "batch": audio[batch], "bank": np.arange(6)}[audio_negatives]
            own = int(np.flatnonzero(seen == audio[batch[i]])[0])
            same = torch.from_numpy(seen // 2 == audio[batch[i]] // 2)[None] if audio_negatives == "bank" else None
            t2a = contrastive_loss(scores[batch[i]][None, seen], torch.tensor([own]), 0.05, 0.1, same, same_source)
            answer = torch.tensor([int(np.flatnonzero(texts == batch[i])[0])])
            a2t = contrastive_loss(scores[texts, audio[batch[i]]][None], answer, 0.05, 0.1)
            total += (t2a + a2t).item() / 2
    assert gallery_loss(scores, gallery, lengths, config, 0.05) == pytest.approx(total / 12, rel=1e-5)


@pytest.mark.parametrize("same_source", ["mask", "positive"])
@pytest.mark.parametrize("text_negatives", ["micro", "batch"])
@pytest.mark.parametrize("audio_negatives", ["micro", "batch", "bank"])
def test_validation_and_training_compute_one_loss(start, audio_negatives, text_negatives, same_source):
    """The training captions measured as validation would, and stepped over as training does, without dropout."""
    torch.set_default_dtype(torch.float64)
    try:
        run = prepared(start("--audio-negatives", audio_negatives, "--text-negatives", text_negatives,
                             "--same-source", same_source, "--label-smoothing", "0.1"))  # fmt: skip
        for module in run.modules():
            module.double().eval()
        (space,) = run.spaces
        space.bank = build_bank(run.config, run.store, space.vectors, space.projection) if space.bank else None
        evaluator = train.Evaluator(run.text_encoder, run.store, "train", run.config)
        assert evaluator.gallery.captions.captions == run.captions.captions
        temperature = space.temperature().item()
        validation = evaluator.measure(run.text_encoder, space.projection, temperature)["loss"]
        assert evaluator.latest.dtype == torch.float64
        total = 0.0
        for batch in train.plan_epoch(run.captions.caption_source, 8, seed=0, epoch=0):
            total += len(batch) * train.train_step(run, run.reader.read(run.step, batch)).item()
        assert validation == pytest.approx(total / len(run.captions), rel=1e-6)
    finally:
        torch.set_default_dtype(torch.float32)
