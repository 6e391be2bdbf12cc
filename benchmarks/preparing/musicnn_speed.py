"""How fast MusiCNN is on a CPU: the encoder against a plain port of its graph, in turn; time per stage; bound by what.

The plain port draws every convolution as the paper does, all filters, and takes the maximum at the end. Both start at
the waveforms and share the spectrogram and the recipe's statistics, so that the difference is the network's alone. Each
round times one after the other; the line says the medians. The share is of the machine's own matrix product: the
convolutions' work (as drawn; for the encoder that of the filters it computes) a second over the product's.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from common.speed import matmul_tflops
from embedding_models.enrichment import enrich
from embedding_models.musicnn.model import PUBLISHED, MusiCNNModel, find_folder, read_weights
from embedding_models.weights import Tensors

SECONDS = 10
_PADDING = ((3, 3), (3, 3), (63, 64), (31, 32), (15, 16), (3, 3), (3, 3), (3, 3))


def plain_frames(tensors: Tensors, spectrograms: torch.Tensor) -> torch.Tensor:
    """The graph as the paper draws it: spectrograms (batch, frames, 96) -> (batch, frames, 753)."""

    def norm(number: int, x: torch.Tensor) -> torch.Tensor:
        name = "batch_normalization" + (f"_{number}" if number else "")
        values = (tensors[f"{name}/{part}"] for part in ("moving_mean", "moving_variance", "gamma", "beta"))
        return functional.batch_norm(x, *values, eps=1e-3)

    def block(number: int, x: torch.Tensor) -> torch.Tensor:
        name = "conv2d" + (f"_{number}" if number else "")
        kernel = tensors[f"{name}/kernel"].permute(3, 2, 0, 1)
        x = functional.pad(x, (0, 0, *_PADDING[number]))
        return norm(number + 1, functional.conv2d(x, kernel, tensors[f"{name}/bias"]).relu()).amax(dim=3)

    x = norm(0, spectrograms[:, None])
    front = torch.cat([block(number, x) for number in range(5)], dim=1)
    mid = [block(5, front.transpose(1, 2)[:, None])]
    for number in (6, 7):
        mid.append(mid[-1] + block(number, mid[-1].transpose(1, 2)[:, None]))
    return torch.cat([front, *mid], dim=1).transpose(1, 2)


def plain_tags(tensors: Tensors, frames: torch.Tensor) -> torch.Tensor:
    """The graph's tagger: frames of one patch (batch, frames, 753) -> (batch, 50)."""

    def norm(number: int, x: torch.Tensor) -> torch.Tensor:
        name = f"batch_normalization_{number}"
        values = (tensors[f"{name}/{part}"] for part in ("moving_mean", "moving_variance", "gamma", "beta"))
        return functional.batch_norm(x, *values, eps=1e-3)

    pooled = torch.stack([frames.amax(dim=1), frames.mean(dim=1)], dim=2).flatten(1)
    hidden = (norm(9, pooled) @ tensors["dense/kernel"] + tensors["dense/bias"]).relu()
    return (norm(10, hidden) @ tensors["dense_1/kernel"] + tensors["dense_1/bias"]).sigmoid()


def drawn_operations(tensors: Tensors, frames: int, live: list[int] | None = None) -> int:
    """Multiplications and additions of the convolutions for one clip; of the front end's `live` filters where given."""
    total = 0
    for number in range(8):
        time_taps, bands, _, filters = tensors["conv2d" + (f"_{number}" if number else "") + "/kernel"].shape
        if live is not None and number < 5:
            filters = live[number]
        positions = 1 if number >= 5 else 96 - bands + 1
        inputs = bands if live is None or number != 5 else sum(live) + 1
        total += 2 * frames * positions * time_taps * inputs * filters
    return total


def seconds_of(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def stages(model: MusiCNNModel, waveforms: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The encoder's steps on a batch, each on what the one before it gives."""
    network = model.network
    spectrograms = model.spectrogram(waveforms)
    x = network.norm(spectrograms)
    frames = network(spectrograms)
    names = ("timbral 7 x 38", "timbral 7 x 67", "temporal 128", "temporal 64", "temporal 32")
    return {
        "spectrogram": lambda: model.spectrogram(waveforms),
        **{name: lambda branch=branch: branch(x) for name, branch in zip(names, network.front, strict=True)},
        "whole network": lambda: network(spectrograms),
        "enrich": lambda: enrich(frames),
    }


@torch.no_grad()
def compare(name: str, batch: int, rounds: int) -> None:
    """Print clips a second of both for one of the package's networks."""
    model, tensors = MusiCNNModel(name, device="cpu"), read_weights(find_folder(name)[0])
    waveforms = 0.1 * torch.randn(batch, SECONDS * model.sample_rate, generator=torch.Generator().manual_seed(0))
    contestants = {
        "encoder": lambda: model.embed_windows(waveforms),
        "plain port": lambda: enrich(plain_frames(tensors, model.spectrogram(waveforms))),
    }
    times: dict[str, list[float]] = {contestant: [] for contestant in contestants}
    for work in contestants.values():
        work()
    for _ in range(rounds):
        for contestant, work in contestants.items():
            times[contestant].append(seconds_of(work))
    rates = {contestant: batch / statistics.median(values) for contestant, values in times.items()}
    speed = matmul_tflops(torch.device("cpu"))
    live = [len(branch.bias) for branch in model.network.front]
    frames = 1 + SECONDS * model.sample_rate // 256
    print(f"{name}, batch {batch}, {torch.get_num_threads()} threads, matrix product {1000 * speed:.0f} GFLOP/s")
    print(f"  live filters of the front end: {live} of {[204, 204, 51, 51, 51]}")
    done = {"encoder": drawn_operations(tensors, frames, live), "plain port": drawn_operations(tensors, frames)}
    for contestant, rate in rates.items():
        share = rate * done[contestant] / speed / 1e12
        work = f"{done[contestant] / 1e9:.2f} GFLOP a clip, {share:.0%} of the matrix product"
        print(f"  {contestant:12} {rate:6.1f} clips/s ({work})")
    print(f"  ratio {rates['encoder'] / rates['plain port']:.1f}; cost {speed / rates['encoder']:.4f} TFLOP a clip")
    for stage, work in stages(model, waveforms).items():
        taken = statistics.median(seconds_of(work) for _ in range(rounds))
        print(f"  {stage:16} {1000 * taken / batch:6.2f} ms a clip")


def main(argv: list[str] | None = None) -> None:
    """Measure both networks of the package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    for name in PUBLISHED:
        compare(name, args.batch, args.rounds)


if __name__ == "__main__":
    main()
