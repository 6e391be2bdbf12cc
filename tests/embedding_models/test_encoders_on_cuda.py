import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity, normalize

from embedding_models import MertModel, MuQEmbeddingModel, MusicLatentSpaceModel, enrich
from embedding_models.kernels import available
from embedding_models.kernels.group_norm import GroupNorm, add_to, moments
from embedding_models.latent import LatentConfig, LatentEncoder
from embedding_models.pipeline import StageSeconds, embed_clips

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
CLOSE = 1e-5  # of the largest value


def difference(found, right):
    assert found.shape == right.shape
    found, right = found.cpu().double(), right.cpu().double()
    return ((found - right).abs().max() / right.abs().max()).item()


@pytest.fixture(scope="module")
def expected():
    return load_file(REFERENCE / "expected.safetensors")


@pytest.fixture(scope="module")
def load(tiny_models):
    """A function (name, device, precision) -> encoder: the reference's MuQ and MERT, a tiny Music2Latent."""

    def loaded(name, device, precision="float32"):
        if name == "muq":
            return MuQEmbeddingModel(REFERENCE / "muq_mulan", REFERENCE / "muq_large", device, precision)
        if name == "mert":
            return MertModel(REFERENCE / "mert", device, precision)
        return MusicLatentSpaceModel(tiny_models / "music2latent", device, precision)

    return loaded


def waves_for(encoder, count=5, seconds=10):
    shape = (count, encoder.channels, seconds * encoder.sample_rate)
    waves = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1
    return waves[:, 0] if encoder.channels == 1 else waves


@pytest.mark.parametrize("wave", ["clip", "short"])
def test_the_reference_files_in_float32(expected, load, wave):
    """Though the process lets torch use TF32 elsewhere, as a training run does."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        layers = expected[f"mert_{wave}_hidden_states"]
        frames = load("mert", "cuda").frames(expected[f"wave_{wave}"][None])[0]
        for number, layer in enumerate(layers):
            assert difference(frames[:, number * 64 : (number + 1) * 64], layer) < CLOSE
        latents = load("muq", "cuda").frames(expected[f"wave_{wave}"][None]).mean(dim=1)
        assert difference(normalize(latents, dim=1)[0], expected[f"muq_mulan_{wave}_latent"]) < CLOSE
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", ["muq", "mert", "latent"])
def test_vectors_equal_the_cpus(load, name):
    encoder = load(name, "cpu")
    waves = waves_for(encoder)
    right = encoder.embed_windows(waves)
    assert difference(load(name, "cuda").embed_windows(waves), right) < CLOSE
    for precision in ("tf32", "float16"):
        found = load(name, "cuda", precision).embed_windows(waves)
        assert cosine_similarity(found, right).min() >= 0.9999


def test_music2latent_at_full_width():
    torch.manual_seed(0)
    network = LatentEncoder(LatentConfig()).eval().requires_grad_(False)
    spectra = torch.randn(3, 2, 1024, 64) * 0.3
    right = network(spectra)
    network.cuda()
    assert difference(network(spectra.cuda()), right) < 1e-2  # torch's own setting: TF32 in convolutions
    torch.backends.cudnn.allow_tf32 = False
    try:
        assert difference(network(spectra.cuda()), right) < CLOSE
    finally:
        torch.backends.cudnn.allow_tf32 = True
    half = network.half()(spectra.cuda().half()).float().cpu()
    assert cosine_similarity(half.flatten(1), right.flatten(1)).min() >= 0.9999


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_quartiles_are_those_of_a_sort(dtype):
    frames = torch.randn(2, 750, 2000, generator=torch.Generator().manual_seed(0))
    frames[:, :, :500] = (frames[:, :, :500] * 2).round()  # values that come again and again
    frames = frames.to(dtype)
    found, right = enrich(frames.cuda()).cpu(), enrich(frames)
    assert torch.equal(found[:, 2000:4000], right[:, 2000:4000])
    assert difference(found, right) < 1e-6


def test_the_group_norms_kernels_equal_torch():
    assert available(), "Triton or a C compiler is missing: Music2Latent runs at half its speed"
    norm = GroupNorm(64).requires_grad_(False)
    x = (torch.randn(2, 64, 107, 512) + 20).contiguous(memory_format=torch.channels_last)
    bias, shortcut = torch.randn(64), torch.randn(2, 64, 107, 512).contiguous(memory_format=torch.channels_last)
    on_card = x.cuda()
    of_card = add_to(on_card, bias.cuda(), shortcut.cuda())
    of_x = add_to(x, bias, shortcut)
    assert difference(on_card, x) < 1e-6
    found = norm.cuda().normalise(on_card, of_card, True)
    assert difference(found, norm.cpu().normalise(x, of_x, True)) < CLOSE
    assert difference(moments(on_card).whole()[1], of_x.whole()[1]) < CLOSE


def test_the_pipeline_gives_what_it_gives_on_the_cpu(load):
    rng = np.random.default_rng(0)

    def clips():
        for number in range(20):
            file = io.BytesIO()
            samples = rng.normal(0, 0.1, (44_100 * (25 if number == 7 else 10), 2))
            soundfile.write(file, samples, 44_100, format="WAV", subtype="FLOAT")
            yield number, file.getvalue()
        yield "text", b"not audio"

    def embedded(device):
        nonlocal rng
        rng = np.random.default_rng(0)
        encoders, seconds = [load(name, device) for name in ("muq", "mert", "latent")], StageSeconds()
        results = dict(item for part in embed_clips(clips(), encoders, 4, 4, seconds) for item in part)
        assert min(seconds.encode[encoder.name] for encoder in encoders) > 0
        return results

    right, found = embedded("cpu"), embedded("cuda")
    assert set(found) == set(right) == {*range(20), "text"}
    assert found.pop("text").reason == right.pop("text").reason == "unreadable"
    for key, vectors in right.items():
        for name, vector in vectors.items():
            assert difference(torch.from_numpy(found[key][name]), torch.from_numpy(vector)) < CLOSE
