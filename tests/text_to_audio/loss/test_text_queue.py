"""The queue of earlier texts in train.py's own step: what is in it, what it is masked by, what it does to the loss."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from helpers.stores import make_header, make_splits, make_vectors
from helpers.tiny_text_models import make_bert
from store.writing import write_store
from text_to_audio.loss.text_queue import TextQueue


@pytest.fixture(params=["micro", "batch"])
def run(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    header, splits = make_header(), make_splits((20, 3, 3))
    splits["train"].source_id = [f"source-{row // 2}" for row in range(20)]
    write_store("e.h5", header, splits, make_vectors(header, splits))
    make_bert(tmp_path / "bert")
    words = "--audio-encoder muq --data-path e.h5 --text-model bert --device cpu --batch-size 4 --lora-dropout 0"
    words += f" --head-dropout 0 --gradient-accumulation-steps 2 --text-queue 12 --text-negatives {request.param}"
    run = train.prepare(train.config_from_arguments(train.build_parser().parse_args(words.split())), None)
    for module in run.modules():
        module.train()
    return run


def step(run, batch):
    data = run.reader.read(run.step, batch)
    losses = train.train_step(run, data)
    run.step += 1
    return data, losses.item()


def test_it_holds_the_last_texts_and_leaves_out_those_of_the_recording_s_source(run):
    (space,) = run.spaces
    sources = run.captions.caption_source
    first, second, third = np.arange(0, 32, 4), np.arange(1, 33, 4), np.arange(2, 34, 4)  # of the same eight sources
    for batch in (first, second):
        data, _ = step(run, batch)
    order = np.concatenate(data.parts)
    assert len(run.queue) == 12
    assert run.queue.source[-8:].tolist() == sources[second[order]].tolist()
    texts = [run.captions.captions[i] for i in second[order]]
    torch.testing.assert_close(run.queue.embeddings[-8:], run.text_encoder(texts).detach(), atol=1e-5, rtol=0)

    queued, queued_source = run.queue.embeddings.clone(), run.queue.source.copy()
    data, loss = step(run, third)
    texts = space.projection.project_text(run.text_encoder([run.captions.captions[i] for i in third]))
    audio = space.projection.standardise_audio(space.vectors[data.rows])
    older = space.projection.project_text(queued)
    mask = torch.from_numpy(sources[third][:, None] == queued_source)
    assert mask.any()
    temperature = 0.07 * space.config.spread
    expected = F.cross_entropy(texts @ audio.T / temperature, torch.arange(8)) / 2
    groups = [np.arange(8)] if run.config.text_negatives == "batch" else data.parts
    for group in groups:
        logits = torch.cat([audio[group] @ texts[group].T, (audio[group] @ older.T).masked_fill(mask[group], -1e9)], 1)
        expected = expected + len(group) / 8 * F.cross_entropy(logits / temperature, torch.arange(len(group))) / 2
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert space.projection.training


def test_the_oldest_leave_and_a_state_comes_back():
    queue = TextQueue(5, 3, torch.device("cpu"))
    queue.add(torch.arange(12.0).view(4, 3), np.arange(4))
    queue.add(torch.arange(12.0, 21.0).view(3, 3), np.arange(4, 7))
    assert queue.source.tolist() == [2, 3, 4, 5, 6]
    assert queue.embeddings[:, 0].tolist() == [6, 9, 12, 15, 18]
    other = TextQueue(5, 3, torch.device("cpu"))
    other.restore(queue.state())
    assert torch.equal(other.embeddings, queue.embeddings)
    assert other.source.tolist() == queue.source.tolist()
    assert queue.blank.shape == (0, 3)
