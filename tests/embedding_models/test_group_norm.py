import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from embedding_models.kernels.group_norm import GroupNorm, add_to, moments

ROOT = Path(__file__).parents[2]

# Runs the Triton kernels in Triton's own interpreter, which has to be asked for before they are made.
INTERPRETED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from embedding_models.kernels import group_norm, group_norm_passes as passes, selection

def activation(channels, time, frequencies, dtype):
    x = torch.randn(2, channels, time, frequencies) * 3 + 5
    return x.to(dtype).contiguous(memory_format=torch.channels_last)

for dtype, close in ((torch.float32, 1e-5), (torch.float16, 1e-2)):
    for shape in ((8, 7, 40), (12, 5, 33), (256, 3, 2)):
        x, shortcut = activation(*shape, dtype), activation(*shape, dtype)
        bias, gain = torch.randn(shape[0]).to(dtype), torch.rand(shape[2]).to(dtype)
        for more in ((None, None), (shortcut, None), (None, gain)):
            right, found = x.clone(), x.clone()
            of_right = group_norm.add_to(right, bias, *more)
            of_found = group_norm.Moments(*passes.add_to(found, bias, *more))
            for a, b in zip((found, *of_found.whole()), (right, *of_right.whole()), strict=True):
                torch.testing.assert_close(a, b, rtol=close, atol=close)
        norm = group_norm.GroupNorm(shape[0]).to(dtype).requires_grad_(False)
        of_x, out = group_norm.Moments(*passes.moments(x)), torch.empty_like(x)
        passes.scale_and_shift(x, *norm._scale_and_shift(of_x, bias), True, out)
        right = norm.normalise(x, group_norm.moments(x), True, bias)
        torch.testing.assert_close(out, right, rtol=close, atol=close)
    for rows in (2, 3, 107, 750):
        x = torch.randn(2, rows, 20).to(dtype)
        x[:, :, :8] = (x[:, :, :8] * 2).round() + 0.0  # values that come again and again, of both signs
        first, second = rows // 4, rows * 3 // 4 - (rows < 4)
        ordered = x.float().sort(dim=1).values
        right = torch.stack([ordered[:, place] for place in (first, first + 1, second, second + 1)], dim=1)
        assert torch.equal(selection.neighbours(x, first, second), right), (dtype, rows)
print("all are equal")
"""


def activation(seed, channels=64, time=6, frequencies=33, mean=0.5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, channels, time, frequencies, generator=generator) + mean
    return x.contiguous(memory_format=torch.channels_last)


def norm_of(channels, seed=0):
    norm = GroupNorm(channels).requires_grad_(False)
    norm.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(seed))
    norm.bias.normal_(generator=torch.Generator().manual_seed(seed))
    return norm


def difference(found, right):
    return ((found - right).abs().max() / right.abs().max()).item()


def naive(norm, x, silu):
    right = functional.group_norm(x.double(), norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps)
    return functional.silu(right) if silu else right


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("mean", [0, 30])  # a large mean is where sums of squares lose their digits
@pytest.mark.parametrize("channels", [8, 64, 256])
def test_equals_group_norm(channels, mean, silu):
    x, norm = activation(channels, channels, mean=mean), norm_of(channels)
    found = norm.normalise(x, moments(x), silu)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert difference(found, naive(norm, x, silu)) < 2e-6 + 1e-7 * mean


def test_a_group_of_millions_of_values():
    """Where torch's own, in channels_last, was off by 1e-4."""
    x, norm = activation(0, 64, 300, 512), norm_of(64)
    assert difference(norm.normalise(x, moments(x), True), naive(norm, x, True)) < 1e-6


def test_a_bias_may_be_left_to_the_norm():
    x, norm, bias = activation(1), norm_of(64), torch.randn(64, generator=torch.Generator().manual_seed(2))
    right = naive(norm, x + bias[:, None, None], True)
    assert difference(norm.normalise(x, moments(x), True, bias), right) < 2e-6
    before = x.clone()
    norm.normalise(x, moments(x), True, bias, in_place=True)
    assert not torch.equal(x, before)
    assert difference(x, right) < 2e-6


def test_adding_gives_the_sum_and_its_moments():
    x, shortcut = activation(3), activation(4)
    generator = torch.Generator().manual_seed(5)
    bias, gain = torch.randn(64, generator=generator), torch.rand(33, generator=generator)
    right = (x + bias[:, None, None]) * gain + shortcut
    mean, variance = add_to(x, bias, shortcut, gain).whole()
    torch.testing.assert_close(x, right)
    torch.testing.assert_close(mean, right.mean(dim=(2, 3)))
    torch.testing.assert_close(variance, right.var(dim=(2, 3), correction=0))


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: it comes with CUDA's torch"
)
def test_the_kernels_equal_torch_in_tritons_interpreter():
    command = [sys.executable, "-c", INTERPRETED, str(ROOT)]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.stdout == "all are equal\n", done.stderr
