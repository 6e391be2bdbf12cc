import numpy as np
import pytest
import torch

from text_to_audio.measuring import metrics
from text_to_audio.measuring.metrics import (
    audio_to_text_ranks,
    chance_level,
    retrieval_metrics,
    rounded,
    text_to_audio_ranks,
)


def naive_t2a(scores, owner):
    ranks = []
    for caption, row in enumerate(scores):
        ahead = [n for n in range(len(row)) if n != owner[caption] and row[n] >= row[owner[caption]]]
        ranks.append(1 + len(ahead))
    return ranks


def naive_a2t(scores, owner):
    ranks = []
    for recording in sorted(set(owner)):
        best = max(scores[c][recording] for c in range(len(owner)) if owner[c] == recording)
        ahead = [c for c in range(len(owner)) if owner[c] != recording and scores[c][recording] >= best]
        ranks.append(1 + len(ahead))
    return ranks


@pytest.mark.parametrize("chunk", [1, 40, 1 << 20])
def test_ranks_against_loops_with_ties(chunk, monkeypatch):
    monkeypatch.setattr(metrics, "_CHUNK_ELEMENTS", chunk)
    rng = np.random.default_rng(0)
    for captions, recordings in ((30, 9), (5, 12), (1, 1)):
        scores = rng.integers(0, 6, (captions, recordings)).astype(np.float32)  # full of ties
        owner = rng.integers(0, recordings, captions)
        arguments = torch.from_numpy(scores), torch.from_numpy(owner)
        assert text_to_audio_ranks(*arguments).tolist() == naive_t2a(scores, owner.tolist())
        assert audio_to_text_ranks(*arguments).tolist() == naive_a2t(scores, owner.tolist())


def test_equal_scores_are_the_worst_rank():
    found = retrieval_metrics(torch.zeros(8, 4), torch.arange(4).repeat_interleave(2))
    assert found["t2a_R@1"] == 0
    assert found["t2a_median_rank"] == 4
    assert found["a2t_median_rank"] == 7  # the six captions of other recordings stand ahead, the own one does not


def test_names_and_values():
    owner = torch.arange(20)
    scores = torch.eye(20)
    scores[0] = torch.arange(20.0, 0, -1)  # caption 0: rank 1
    scores[1, :6] += 2  # caption 1: 5 others tie or lead -> rank 2 after the own 3
    found = retrieval_metrics(scores, owner)
    names = ("R@1", "R@5", "R@10", "MRR", "median_rank")
    assert list(found) == [f"{way}_{name}" for way in ("t2a", "a2t") for name in names]
    ranks = np.array(naive_t2a(scores.numpy(), owner.tolist()))
    assert found["t2a_R@1"] == pytest.approx(100 * (ranks <= 1).mean())
    assert found["t2a_R@5"] == pytest.approx(100 * (ranks <= 5).mean())
    assert found["t2a_MRR"] == pytest.approx((1 / ranks).mean())
    ranks = np.array(naive_a2t(scores.numpy(), owner.tolist()))
    assert found["a2t_MRR"] == pytest.approx((1 / ranks).mean())
    assert found["a2t_median_rank"] == np.median(ranks)


def test_nan_never_counts_as_found():
    scores = torch.eye(4)
    scores[2, 1] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        retrieval_metrics(scores, torch.arange(4))


def test_chance_is_what_random_rankings_reach():
    rng = np.random.default_rng(0)
    recordings, repeats = 40, 300
    scores = torch.from_numpy(rng.random((recordings * repeats, recordings)))
    owner = torch.arange(recordings).repeat(repeats)
    ranks = text_to_audio_ranks(scores, owner).double()
    chance = chance_level(recordings)
    assert chance["t2a_R@10"] == 25
    assert 100 * (ranks <= 10).double().mean() == pytest.approx(chance["t2a_R@10"], abs=1.5)
    assert (1 / ranks).mean() == pytest.approx(chance["t2a_MRR"], abs=0.005)
    assert np.median(ranks) == pytest.approx(chance["t2a_median_rank"], abs=1)
    assert chance_level(4)["t2a_R@5"] == 100


def test_rounding():
    found = rounded({"t2a_R@1": 45.238, "t2a_MRR": 0.582349, "A/a2t_MRR": 0.12345, "gallery": 400})
    assert found == {"t2a_R@1": 45.24, "t2a_MRR": 0.5823, "A/a2t_MRR": 0.1235, "gallery": 400}
