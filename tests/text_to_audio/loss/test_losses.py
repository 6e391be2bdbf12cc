import math

import pytest
import torch
import torch.nn.functional as F

from text_to_audio.loss.info_nce import audio_to_text_loss, contrastive_loss, loss_in_groups


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def naive(queries, candidates, target, temperature, smoothing=0.0, same_source=None, treat="mask"):
    losses = []
    for q, query in enumerate(queries):
        same = set() if same_source is None else {c for c in range(len(candidates)) if same_source[q][c]}
        positives = {target[q]} | (same if treat == "positive" else set())
        allowed = [c for c in range(len(candidates)) if c in positives or c not in same]
        scores = {c: float(query @ candidates[c]) / temperature for c in allowed}
        total = math.log(sum(math.exp(score) for score in scores.values()))
        loss = 0.0
        for c in allowed:
            weight = (1 - smoothing) * (c in positives) / len(positives) + smoothing / len(allowed)
            loss -= weight * (scores[c] - total)
        losses.append(loss)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("treat", [None, "mask", "positive"])
def test_against_loops_over_any_candidates(smoothing, treat):
    queries, candidates = unit(5, 8), unit(11, 8, seed=1)
    target = torch.tensor([3, 0, 10, 3, 7])
    same = None
    if treat:
        same = torch.rand(5, 11, generator=torch.Generator().manual_seed(2)) < 0.3
        same[0] = False
        same[1, 0] = True  # a query's own recording is of its own source, and stays its target
    found = contrastive_loss(queries @ candidates.T, target, 0.07, smoothing, same, treat or "mask")
    expected = naive(queries, candidates, target.tolist(), 0.07, smoothing, same, treat or "mask")
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_gradients_are_finite_where_candidates_are_left_out():
    similarity = unit(4, 6).clone().requires_grad_()
    same = torch.ones(4, 6, dtype=torch.bool)
    contrastive_loss(similarity, torch.arange(4), 0.07, 0.1, same, "mask").backward()
    assert torch.equal(similarity.grad, torch.zeros(4, 6, dtype=torch.float64))


def test_an_unknown_treatment_is_refused():
    with pytest.raises(ValueError, match="'mask' or 'positive'"):
        contrastive_loss(unit(2, 2), torch.arange(2), 1.0, same_source=torch.eye(2) > 0, treat_same_source="drop")


def test_both_directions():
    text, audio = unit(4, 8), unit(9, 8, seed=1)
    own = torch.tensor([8, 2, 0, 5])
    t2a = naive(text, audio, own.tolist(), 0.07)
    a2t = naive(audio[own], text, [0, 1, 2, 3], 0.07)
    assert contrastive_loss(text @ audio.T, own, 0.07).item() == pytest.approx(t2a, rel=1e-12)
    assert audio_to_text_loss(text @ audio.T, own, 0.07).item() == pytest.approx(a2t, rel=1e-12)


def test_groups_see_only_their_own_recordings():
    text, audio = unit(7, 8), unit(7, 8, seed=1)
    found = loss_in_groups(text @ audio.T, [4, 3], 0.07, 0.1)
    parts = [F.cross_entropy(text[p] @ audio[p].T / 0.07, torch.arange(n), label_smoothing=0.1) for p, n in
             ((slice(0, 4), 4), (slice(4, 7), 3))]  # fmt: skip
    assert found.item() == pytest.approx(((4 * parts[0] + 3 * parts[1]) / 7).item(), rel=1e-12)
    whole = contrastive_loss(text @ audio.T, torch.arange(7), 0.07, 0.1)
    assert whole > found  # more to be told from


def test_queued_texts_are_more_negatives_except_those_of_the_recording_s_source():
    text, audio, queue = unit(4, 8), unit(9, 8, seed=1), unit(5, 8, seed=2)
    own = torch.tensor([8, 2, 0, 5])
    same = torch.zeros(4, 5, dtype=torch.bool)
    same[1, 3] = same[1, 4] = same[2, 0] = True
    found = audio_to_text_loss(text @ audio.T, own, 0.07, 0.0, (audio[own] @ queue.T, same))
    expected = naive(
        audio[own], torch.cat([text, queue]), list(range(4)), 0.07,
        same_source=torch.cat([torch.zeros(4, 4, dtype=torch.bool), same], 1).tolist(),
    )  # fmt: skip
    assert found.item() == pytest.approx(float(expected), rel=1e-9)
    assert found > audio_to_text_loss(text @ audio.T, own, 0.07)
