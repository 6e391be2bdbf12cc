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
    mrr = mrr or [0.5] * len(curve)
    return [
        epoch
        for epoch, (hits, own) in enumerate(zip(curve, mrr, strict=True), start)
        if best.add(epoch, (100 * hits.double().mean().item(), own), hits, audio)
    ]


MRR = [0.4, 0.6, 0.62, 0.66, 0.67, 0.61]  # with the epoch before: 0.4, 0.5, 0.61, 0.64, 0.665, 0.64


def test_a_large_validation_keeps_the_highest_r1():
    shares = (0.30, 0.55, 0.61, 0.60, 0.58, 0.59)
    best = Best()
    assert train_through(best, [epoch_of(round(share * 5000), 5000) for share in shares], MRR) == [1, 2, 3]
    assert (best.r1_epoch, best.r1) == (3, (pytest.approx(61), 0.62))


def test_a_small_validation_keeps_the_best_mrr():
    # about the same shares of 54, each missing another one: nobody can say which R@1 is better
    curve = [epoch_of(16, 54), *(epoch_of(33 + missed, 54, missed + (missed > 0)) for missed in range(5))]
    assert [int(hits.sum()) for hits in curve] == [16, 33, 32, 32, 32, 32]
    best = Best()
    assert train_through(best, curve, MRR) == [1, 2, 3, 4, 5]
    assert (best.r1_epoch, best.r1) == (5, (pytest.approx(100 * 32 / 54), 0.67))
    # what is clearly worse is not kept, however good its MRR
    assert train_through(best, [epoch_of(24, 54), epoch_of(20, 54)], [0.9, 0.9], start=7) == []
    # and where a new highest R@1 rules out the kept epoch, it is kept whatever its MRR
    assert train_through(best, [epoch_of(54, 54)], [0.1], start=9) == [9]


def test_one_lucky_epoch_is_averaged_with_the_one_before():
    curve = [epoch_of(20, 40)] * 5
    best = Best()
    assert train_through(best, curve, [0.5, 0.4, 0.53, 0.52, 0.5]) == [1, 4]  # 0.5, 0.45, 0.465, 0.525, 0.51
    assert train_through(best, curve[:1], [0.55], start=6) == []  # 0.525 again: no better


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
    mrr = rng.random(8).tolist()
    whole, first = Best(), Best()
    kept = train_through(whole, curve, mrr)
    before = train_through(first, curve[:stopped_after], mrr[:stopped_after]) if stopped_after else []
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    second = Best.from_state(torch.load(file, weights_only=True))
    assert before + train_through(second, curve[stopped_after:], mrr[stopped_after:], start=stopped_after + 1) == kept
    assert (second.r1, second.r1_epoch) == (whole.r1, whole.r1_epoch)
    assert 1 < len(kept) < len(curve)


def test_a_run_from_before_goes_on_by_the_highest():
    old = Best.from_state({"r1": [50.0, 0.6], "r1_epoch": 4, "loss": 1.5})
    curve = [epoch_of(found, 20) for found in (10, 9, 10, 11, 10)]
    assert train_through(old, curve, mrr=[0.59, 0.7, 0.61, 0.3, 0.9], start=5) == [7, 8]
    again = Best.from_state(old.state())
    assert again.hits is None
    assert how_sure(again, np.arange(20)) == "validation: kept epoch 8, R@1 55.0, MRR 0.30, the highest R@1"


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
