import io

import numpy as np
import pytest
import torch

from text_to_audio.measuring.metrics import standard_error
from text_to_audio.training.keeping import Best, alike, how_sure, spans


def epoch_of(found, captions, missed=0):
    """Hits of an epoch: of the first `found` captions, but of the first `missed` ones."""
    hits = torch.zeros(captions, dtype=torch.bool)
    hits[missed:found] = True
    return hits


def train_through(best, curve, mrr=None, start=1):
    """Let `best` decide epoch after epoch; returns those at which the checkpoint was written."""
    audio = np.arange(len(curve[0]))
    return [
        epoch
        for epoch, hits in enumerate(curve, start)
        if best.add(epoch, (100 * hits.double().mean().item(), mrr[epoch - 1] if mrr else 0.5), hits, audio)
    ]


def test_a_large_validation_keeps_the_highest():
    shares = (0.30, 0.55, 0.61, 0.60, 0.58)
    best = Best()
    assert train_through(best, [epoch_of(round(share * 5000), 5000) for share in shares]) == [1, 2, 3]
    assert (best.r1_epoch, best.r1[0]) == (3, pytest.approx(61))


def test_a_small_validation_keeps_the_latest_that_may_be_as_good():
    # 33 of 54, then 32 of which one is another: the same rates as above, and nobody can say which is better
    curve = [epoch_of(16, 54), epoch_of(30, 54), epoch_of(33, 54), epoch_of(33, 54, missed=1), epoch_of(34, 54, 2)]
    best = Best()
    assert train_through(best, curve) == [1, 2, 3, 4, 5]
    assert best.r1_epoch == 5
    # what is clearly worse is not kept, however late it is
    assert train_through(best, [epoch_of(24, 54), epoch_of(20, 54)], start=6) == []
    assert best.r1_epoch == 5


def test_only_what_differs_counts():
    audio = np.arange(60)
    highest = epoch_of(30, 60)
    worse = epoch_of(28, 60)  # two lost, none gained
    other = torch.roll(highest, 20)  # and two lost where 18 are gained: as bad a rate, but that is chance
    other[torch.nonzero(other & ~highest)[:2, 0]] = False
    assert worse.sum() == other.sum() == 28
    assert alike([highest, worse], audio) == [1]
    assert alike([highest, other], audio) == [1, 2]
    assert alike([highest, epoch_of(29, 60)], audio) == [1, 2]  # one lost is one standard error, exactly


def test_captions_of_one_recording_are_not_independent():
    lost = torch.tensor([1.0] * 6 + [-1.0] * 3 + [0.0] * 21).double()  # found by the best, and not
    alone, thrice = torch.arange(30), torch.arange(30) // 3
    for audio in (alone, thrice, thrice[torch.randperm(30)]):
        n, mean = len(set(audio.tolist())), lost.mean()
        sums = [sum(lost[i] - mean for i in range(30) if audio[i] == each) for each in set(audio.tolist())]
        expected = (n / (n - 1) * sum(each**2 for each in sums)) ** 0.5 / 30
        assert standard_error(lost, audio) == pytest.approx(float(expected))
    assert standard_error(lost, alone) == pytest.approx(float(lost.std() / 30**0.5))
    assert standard_error(lost, thrice) > 1.5 * standard_error(lost, alone)
    assert standard_error(lost[:2], torch.zeros(2, dtype=torch.long)) == float("inf")


@pytest.mark.parametrize("stopped_after", [0, 1, 3, 5])
def test_a_run_that_goes_on_decides_the_same(stopped_after):
    rng = np.random.default_rng(stopped_after)
    curve = [torch.from_numpy(rng.random(40) < share) for share in (0.2, 0.5, 0.55, 0.5, 0.6, 0.4, 0.57, 0.3)]
    whole, first = Best(), Best()
    kept = train_through(whole, curve)
    before = train_through(first, curve[:stopped_after]) if stopped_after else []
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    second = Best.from_state(torch.load(file, weights_only=True))
    assert before + train_through(second, curve[stopped_after:], start=stopped_after + 1) == kept
    assert (second.r1, second.r1_epoch) == (whole.r1, whole.r1_epoch)
    assert len(kept) < len(curve)


def test_a_run_from_before_goes_on_by_the_highest():
    old = Best.from_state({"r1": [50.0, 0.6], "r1_epoch": 4, "loss": 1.5})
    curve = [epoch_of(found, 20) for found in (10, 9, 10, 11, 10)]
    assert train_through(old, curve, mrr=[*[0] * 4, 0.59, 0.7, 0.61, 0.3, 0.9], start=5) == [7, 8]
    assert "hits" not in {key for key, value in old.state().items() if value is not None}
    assert how_sure(old, np.arange(20)) == "validation: kept epoch 8, R@1 55.0, MRR 0.30, the highest R@1"


def test_how_sure():
    best = Best()
    train_through(best, [epoch_of(16, 54), epoch_of(33, 54), epoch_of(33, 54, missed=1)], mrr=[0.2, 0.3, 0.31])
    assert how_sure(best, np.arange(54)) == (
        "validation t2a_R@1 61.1 +- 6.7 over 54 recordings: epochs 2, 3 cannot be told apart; "
        "kept epoch 3, R@1 59.3, MRR 0.31"
    )
    best = Best()
    train_through(best, [epoch_of(2000, 5000), epoch_of(3000, 5000)])
    assert how_sure(best, np.arange(5000)) == (
        "validation t2a_R@1 60.0 +- 0.7 over 5000 recordings: no other epoch comes near epoch 2; "
        "kept epoch 2, R@1 60.0, MRR 0.50"
    )


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([4], "4"), ([4, 5], "4, 5"), ([4, 5, 6], "4 to 6"), ([1, 3, 5, 6, 7, 9, 10], "1, 3, 5 to 7, 9, 10")],
)
def test_spans(numbers, text):
    assert spans(numbers) == text
