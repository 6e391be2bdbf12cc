import itertools

import numpy as np
import pytest
import torch

from embedding_models import enrich


def naive(frames):
    """The three blocks of one window, by numpy and a loop."""
    mean = frames.mean(axis=0)
    low, high = np.percentile(frames, [25, 75], axis=0)
    movement = np.zeros(frames.shape[1])
    for before, after in itertools.pairwise(frames):
        movement += np.abs(after - before)
    return np.concatenate([mean, (high - low) / 1.3489795, movement / max(len(frames) - 1, 1)])


@pytest.mark.parametrize("time", [2, 3, 4, 5, 107, 750])
def test_equals_percentiles_and_a_loop(time):
    frames = np.random.default_rng(time).normal(size=(3, time, 11))
    vectors = enrich(torch.from_numpy(frames).float())
    assert vectors.shape == (3, 33)
    assert vectors.dtype == torch.float32
    np.testing.assert_allclose(vectors, [naive(item) for item in frames], atol=2e-6)


def test_equals_torch_quantile():
    frames = torch.randn(2, 250, 40, generator=torch.Generator().manual_seed(0))
    low, high = torch.quantile(frames, torch.tensor([0.25, 0.75]), dim=1)
    torch.testing.assert_close(enrich(frames)[:, 40:80], (high - low) / 1.3489795)


def test_one_frame_has_neither_spread_nor_movement():
    frames = torch.randn(2, 1, 5)
    vectors = enrich(frames)
    assert torch.equal(vectors[:, :5], frames[:, 0])
    assert not vectors[:, 5:].any()


def test_spread_of_a_normal_distribution_is_its_deviation_and_movement_has_no_sign():
    frames = 3 * torch.randn(1, 20_000, 1, generator=torch.Generator().manual_seed(0)) + 5
    mean, spread, movement = enrich(frames)[0]
    assert mean == pytest.approx(5, abs=0.1)
    assert spread == pytest.approx(3, abs=0.1)
    assert movement > 1
    torch.testing.assert_close(enrich(frames.flip(1))[0, 2], movement)


def test_takes_half_precision_and_leaves_its_input_alone():
    frames = torch.randn(1, 8, 3).half()
    before = frames.clone()
    assert enrich(frames).dtype == torch.float32
    assert torch.equal(frames, before)


def test_full_mert_width():
    frames = torch.randn(1, 750, 25_600)  # torch.quantile refuses this size
    vectors = enrich(frames)
    np.testing.assert_allclose(vectors[0, 25_600:25_650], naive(frames[0, :, :50].numpy())[50:100], atol=1e-5)
