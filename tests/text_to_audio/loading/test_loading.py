import itertools
import time

import numpy as np
import pytest
import torch

from common.errors import UserError
from helpers.stores import make_header, make_splits, make_vectors
from helpers.tiny_text_models import make_bert
from store.reading import EmbeddingStore, Split
from store.writing import write_store
from text_to_audio.config import TrainingConfig
from text_to_audio.loading import vectors as vectors_module
from text_to_audio.loading.batches import batches_per_epoch, micro_batches, padding_share, plan_epoch
from text_to_audio.loading.captions import CaptionSet
from text_to_audio.loading.tokens import TokenCache
from text_to_audio.loading.vectors import AudioVectors
from text_to_audio.model.text_encoder import TextEncoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    model = make_bert(tmp_path_factory.mktemp("bert"))
    return TextEncoder(TrainingConfig("muq", text_model=model, device="cpu"))


def check_plan(source, size, plan):
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(source)))  # each caption once, none lost
    assert all(len(set(source[batch])) == len(batch) for batch in plan)
    sizes = [len(batch) for batch in plan]
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
    assert len(plan) == batches_per_epoch(source, size)


def test_no_source_twice_in_any_batch_whatever_the_data():
    rng = np.random.default_rng(0)
    for trial in range(300):
        sources = int(rng.integers(1, 40))
        counts = rng.integers(1, rng.integers(2, 30), sources)
        source = rng.permutation(np.repeat(np.arange(sources), counts))
        size = int(rng.integers(1, 50))
        check_plan(source, size, plan_epoch(source, size, seed=trial, epoch=1))


def test_as_few_batches_as_can_be():
    assert batches_per_epoch(np.repeat(np.arange(100), 10), 64) == 16
    assert batches_per_epoch(np.repeat(np.arange(20), 10), 64) == 10  # batches of 20, one per source
    assert batches_per_epoch(np.array([0, 0, 0, 0, 1, 2]), 64) == 4


def test_seed_and_epoch_decide():
    source = np.repeat(np.arange(50), 6)
    first, same, epoch, seed = (plan_epoch(source, 16, *key) for key in ((1, 2), (1, 2), (1, 3), (2, 2)))
    assert all(np.array_equal(a, b) for a, b in zip(first, same, strict=True))
    for other in (epoch, seed):
        assert not any(np.array_equal(np.sort(a), np.sort(b)) for a, b in zip(first, other, strict=True))


def test_all_pairs_of_sources_meet():
    """A plan that deals sources in step would compare the same few with each other all epoch long."""
    source = np.repeat(np.arange(60), 20)
    plan = plan_epoch(source, 30, seed=0, epoch=1)
    met = np.zeros((60, 60), int)
    for batch in plan:
        met[np.ix_(source[batch], source[batch])] += 1
    pairs = met[np.triu_indices(60, 1)]
    expected = 40 * 30 * 29 / (60 * 59)
    assert pairs.mean() == pytest.approx(expected)
    assert pairs.std() < 3  # a binomial has 2.7
    assert (pairs == 0).mean() < 0.03  # the two sources of one round do not meet in this epoch


def test_full_size_is_planned_in_no_time(record_property):
    rng = np.random.default_rng(0)
    source = np.repeat(np.arange(5000), rng.integers(15, 24, 5000))[:95_000]
    lengths = rng.integers(10, 192, len(source))
    start = time.perf_counter()
    plan = plan_epoch(source, 256, seed=0, epoch=1)
    share = padding_share(plan, lengths, 32)
    assert time.perf_counter() - start < 2  # 0.2 s on one core
    assert len(plan) == -(-len(source) // 256)
    check_plan(source, 256, plan)
    random = 1 - lengths.mean() / np.mean([lengths[part].max() for part in np.split(rng.permutation(94_976), 2968)])
    assert share < 0.1 < 0.4 < random


def test_micro_batches_are_equal_and_of_like_length():
    lengths = np.array([5, 50, 6, 60, 7, 70, 8, 80, 9, 90])
    captions = np.array([9, 1, 0, 3, 2, 5, 4, 7, 6])
    parts = list(micro_batches(captions, lengths, 4))
    assert [len(part) for part in parts] == [3, 3, 3]
    assert sorted(np.concatenate(parts).tolist()) == list(range(9))
    longest = [lengths[captions[part]] for part in parts]
    assert all(a.max() <= b.min() for a, b in itertools.pairwise(longest))
    whole = np.arange(10)
    padded = sum(len(p) * lengths[whole[p]].max() for p in micro_batches(whole, lengths, 4))
    assert padding_share([whole], lengths, 4) == pytest.approx(1 - lengths.sum() / padded)
    assert padding_share([np.arange(10)], lengths, 1) == 0


def test_cached_tokens_equal_fresh_ones(encoder):
    texts = [f"{word} song {'with drum ' * i}" for i, word in enumerate(["calm", "happy", "slow", "fast"])]
    cache = TokenCache(encoder, texts)
    chosen = np.array([3, 0, 2])
    ids, mask = tokens = cache.padded(chosen)
    with torch.no_grad():
        encoder.eval()
        torch.testing.assert_close(encoder.encode(tokens), encoder([texts[i] for i in chosen]))
    assert cache.lengths.tolist() == [len(row) for row in encoder.tokenise(texts)]
    assert (mask.sum(1).numpy() == cache.lengths[chosen]).all()
    assert (ids[mask == 0] == encoder.pad_token).all()


def test_captions_know_their_source():
    split = Split(["a", "b", "c"], ["s", "t", "s"], ["1", "2", "3", "4"], np.array([0, 2, 1, 2]), ["main"] * 4)
    captions = CaptionSet.of(split)
    assert captions.caption_source.tolist() == [0, 0, 1, 0]
    assert len(captions) == 4


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_audio_vectors_by_row(tmp_path, in_memory, dtype, monkeypatch):
    if not in_memory:
        monkeypatch.setattr(vectors_module, "IN_MEMORY_BYTES", 0)
    header, splits = make_header(dtype), make_splits()
    vectors = make_vectors(header, splits)
    vectors["train", "muq"][3, 2] = np.nan
    write_store(tmp_path / "e.h5", header, splits, vectors)
    audio = AudioVectors(EmbeddingStore(tmp_path / "e.h5"), "train", "muq")
    rows = np.array([5, 0, 6, 0])
    assert torch.equal(audio[rows], torch.from_numpy(vectors["train", "muq"][rows]))
    assert (len(audio), audio.dim) == (7, 6)
    with pytest.raises(UserError, match=r"e\.h5: train vector of muq: expected finite numbers for data/train0003\.wav"):
        audio[np.array([5, 3])]
