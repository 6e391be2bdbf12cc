import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from helpers.stores import make_header, make_splits, make_vectors
from helpers.tiny_text_models import make_bert, make_qwen3
from store.writing import write_store
from text_to_audio.loading.batches import micro_batches
from text_to_audio.loss.bank import build_bank
from text_to_audio.loss.gradient_caching import seed_dropout

TEMPERATURE = 0.07


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caching")
    header, splits = make_header(), make_splits((24, 3, 3))
    splits["train"].source_id = [f"source-{row // 2}" for row in range(24)]
    splits["train"].caption = [f"{'calm happy piano ' * (i % 5)}song {i}. A slow drum." for i in range(48)]
    write_store(folder / "embeddings.h5", header, splits, make_vectors(header, splits))
    make_bert(folder / "bert")
    make_qwen3(folder / "qwen3")
    return folder


@pytest.fixture
def double_run(parts, tmp_path, monkeypatch):
    """A run in float64 whose LoRA does something, with dropout on in LoRA and head."""
    monkeypatch.chdir(tmp_path)

    def make(*words, model="bert"):
        fixed = ["--audio-encoder", "muq", "--data-path", str(parts / "embeddings.h5"), "--device", "cpu"]
        sizes = "--batch-size 3 --gradient-accumulation-steps 4 --hidden-dim 16 --lora-dropout 0.2 --head-dropout 0.3"
        words = [*fixed, "--text-model", str(parts / model), *sizes.split(), *words]
        config = train.config_from_arguments(train.build_parser().parse_args(words))
        torch.set_default_dtype(torch.float64)  # so that the store's statistics and the bank are float64 too
        run = train.prepare(config, train.start_log("train", "train.log"))
        for module in run.modules():
            module.double().train()
        (space,) = run.spaces
        if space.bank:
            space.bank = build_bank(config, run.store, space.vectors, space.projection)
        for name, parameter in run.text_encoder.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, 0, 0.2, torch.Generator().manual_seed(len(name)))
        run.step = 5
        return run

    yield make
    torch.set_default_dtype(torch.float32)


def gradients(run):
    trained = [p for module in run.modules() for p in module.parameters() if p.requires_grad]
    found = [p.grad.clone() for p in trained]
    for p in trained:
        p.grad = None
    return found


BATCH = np.array(
    [0, 5, 8, 15, 17, 20, 24, 29, 33, 38, 42]
)  # captions of sources 0, 1, 2, ... : row i // 2, source i // 4


def step(run, batch):
    """train.py's step; its loss as a number."""
    return train.train_step(run, run.reader.read(run.step, batch)).item()


def single_graph(run, batch):
    """The same micro-batches with their graphs kept, one naive loss over all embeddings, one backward."""
    config, (space,) = run.config, run.spaces
    lengths = run.tokens.lengths
    micro = list(micro_batches(batch, lengths, config.batch_size))
    embeddings = []
    for number, part in enumerate(micro):
        seed_dropout(config.seed, run.step, number)
        embeddings.append(run.text_encoder.encode(run.tokens.padded(batch[part])))
    seed_dropout(config.seed, run.step, len(micro))
    text, order = space.projection.project_text(torch.cat(embeddings)), np.concatenate(micro)
    rows = batch[order] // 2
    assert np.array_equal(rows, run.captions.caption_audio[batch[order]])
    everything = space.projection.standardise_audio(space.vectors[np.arange(24)])
    audio = everything[rows]
    scale = 1 / space.temperature()
    if config.audio_negatives == "bank":
        logits, target = text @ everything.T * scale, torch.from_numpy(rows)
        other = (rows[:, None] // 2 == np.arange(24) // 2) & (rows[:, None] != np.arange(24))
        if config.same_source == "mask":
            t2a = F.cross_entropy(logits.masked_fill(torch.from_numpy(other), -1e9), target)
        else:
            t2a = (F.cross_entropy(logits, target) + F.cross_entropy(logits, torch.from_numpy(rows ^ 1))) / 2
    elif config.audio_negatives == "batch":
        t2a = F.cross_entropy(text @ audio.T * scale, torch.arange(len(rows)))
    else:
        t2a, start = 0.0, 0
        for part in micro:
            block = slice(start, start + len(part))
            logits = text[block] @ audio[block].T * scale
            t2a = t2a + F.cross_entropy(logits, torch.arange(len(part)), reduction="sum") / len(rows)
            start += len(part)
    loss = (t2a + F.cross_entropy(audio @ text.T * scale, torch.arange(len(rows)))) / 2
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("model", ["bert", "qwen3"])
@pytest.mark.parametrize("recomputed", ["on", "off"])
@pytest.mark.parametrize("negatives", ["micro", "batch", "bank mask", "bank positive"])
def test_gradients_are_those_of_one_graph(double_run, model, recomputed, negatives):
    audio, *same = negatives.split()
    words = ["--text-negatives", "batch", "--audio-negatives", audio, "--learn-temperature"]
    words += ["--gradient-checkpointing", recomputed, *(["--same-source", same[0]] if same else [])]
    run = double_run(*words, model=model)
    loss = step(run, BATCH)
    found = gradients(run)
    assert loss == pytest.approx(single_graph(run, BATCH), abs=1e-10)
    expected = gradients(run)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=0)
        assert other.abs().max() > 1e-6
    run.step += 1
    step(run, BATCH)
    other_masks = gradients(run)
    assert max((a - b).abs().max() for a, b in zip(found, other_masks, strict=True)) > 1e-4  # dropout was on


def test_micro_texts_see_the_bank_too(double_run):
    """With the texts of one micro-batch on each side of audio -> text, the bank gives the mean over the texts."""
    run = double_run("--audio-negatives", "bank", "--head-dropout", "0", "--lora-dropout", "0")
    loss = step(run, BATCH)
    found = gradients(run)
    total = 0.0
    micro = list(micro_batches(BATCH, run.tokens.lengths, 3))
    for part in micro:
        chosen = BATCH[part]
        run.config.text_negatives = "batch"
        assert run.config.batch_size == 3
        total += single_graph(run, chosen) * len(part) / len(BATCH)
        for p in (*run.text_encoder.parameters(), *run.spaces[0].projection.parameters()):
            if p.requires_grad:
                kept = getattr(p, "kept", 0.0)
                p.kept, p.grad = kept + p.grad * len(part) / len(BATCH), None
    assert loss == pytest.approx(total, abs=1e-10)
    trained = [p for m in (run.text_encoder, run.spaces[0].projection) for p in m.parameters() if p.requires_grad]
    for one, p in zip(found, trained, strict=True):
        torch.testing.assert_close(one, p.kept, atol=1e-8, rtol=0)


def test_dropout_is_drawn_from_seed_step_and_micro_batch():
    def draw(*key):
        seed_dropout(*key)
        return torch.rand(8)

    assert torch.equal(draw(42, 3, 1), draw(42, 3, 1))
    draws = [draw(*key) for key in ((42, 3, 1), (42, 3, 2), (42, 4, 1), (43, 3, 1), (42, 1, 3))]
    assert len({tuple(each.tolist()) for each in draws}) == 5
