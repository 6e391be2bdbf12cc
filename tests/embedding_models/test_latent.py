import argparse
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.errors import UserError
from embedding_models import AudioError, MusicLatentSpaceModel
from embedding_models.latent import LatentConfig

CLOSE = 1e-5  # of the largest value


def difference(found, right):
    assert found.shape == right.shape
    return ((found - right).abs().max() / right.abs().max()).item()


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The package's own network at full width, its zero-filled layers made random, and a checkpoint of it."""
    network = pytest.importorskip("music2latent.models").UNet().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.02, generator=generator)
    network.encoder.gain.scale.data.uniform_(0.5, 1.5, generator=generator)
    folder = tmp_path_factory.mktemp("music2latent")
    # A training checkpoint holds more than tensors, which torch refuses to unpickle by default.
    settings = {"arguments": argparse.Namespace(lr=1e-4), "loss": np.float64(0.1), "mean": np.zeros(3)}
    torch.save({"gen_state_dict": network.state_dict(), **settings}, folder / "music2latent.pt")
    return network, folder


@pytest.fixture(scope="module")
def model(official):
    return MusicLatentSpaceModel(official[1], device="cpu")


@pytest.fixture
def tiny(tiny_models, tmp_path):
    return shutil.copytree(tiny_models / "music2latent", tmp_path / "music2latent")


def official_latents(network, wave):
    """The package's encoding, (channels, samples) -> (channels, 64, frames)."""
    from music2latent.inference import encode_audio_inference

    return torch.cat(
        [
            encode_audio_inference(channel[None].numpy(), SimpleNamespace(gen=network), 44_100 * 60, 1, device="cpu")
            for channel in wave
        ]
    )


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")  # the package's own autocast
def test_equals_the_package_at_full_width(official, model):
    assert (model.name, model.sample_rate, model.channels, model.frame_dim, model.dim) == (
        "latent",
        44_100,
        2,
        192,
        576,
    )
    waves = torch.randn(3, 2, 44_100, generator=torch.Generator().manual_seed(1)) * 0.1
    waves[2, 1] = waves[2, 0]  # mono, as both channels
    frames = model.frames(waves)
    for wave, found in zip(waves, frames, strict=True):
        left, right = official_latents(official[0], wave)
        correct = torch.cat([left, right, torch.sqrt(left**2 + right**2)]).T
        assert difference(found, correct) < CLOSE
        assert difference(model.frames(wave[None])[0], found) < CLOSE
    assert torch.equal(frames[2, :, :64], frames[2, :, 64:128])


def test_half_precision_is_close(tiny_models, monkeypatch):
    """The weights in half precision, which a CPU can compute with too."""
    model = MusicLatentSpaceModel(tiny_models / "music2latent", device="cpu")
    waves = torch.randn(2, 2, model.sample_rate, generator=torch.Generator().manual_seed(0)) * 0.1
    right = model.embed_windows(waves)
    monkeypatch.setattr(model, "precision", "float16")
    found = model.embed_windows(waves)
    assert not torch.equal(found, right)
    assert torch.nn.functional.cosine_similarity(found, right).min() >= 0.9999


def test_a_batch_equals_its_windows_one_by_one(tiny_models):
    model = MusicLatentSpaceModel(tiny_models / "music2latent", device="cpu")
    waves = torch.randn(6, 2, 2 * model.sample_rate, generator=torch.Generator().manual_seed(0)) * 0.1
    together = model.embed_windows(waves)  # twelve signals, more than one pass takes
    assert together.shape == (6, model.dim)
    for wave, vector in zip(waves, together, strict=True):
        assert difference(model.embed_windows(wave[None])[0], vector) < CLOSE


def test_half_a_second_and_silence_are_enough(tiny_models):
    model = MusicLatentSpaceModel(tiny_models / "music2latent", device="cpu")
    samples = -(-model.sample_rate // 2)
    assert torch.isfinite(model.embed_windows(torch.zeros(1, 2, samples))).all()
    assert torch.isfinite(model.embed_windows(torch.randn(1, 2, samples))).all()
    with pytest.raises(AudioError) as caught:
        model.embed_windows(torch.zeros(1, 2, samples - 1))
    assert caught.value.reason == "too short"
    with pytest.raises(ValueError, match=r"expected waveforms \(batch, 2, samples\)"):
        model.embed_windows(torch.zeros(2, 24_000))


def test_without_a_config_the_published_widths_are_meant():
    config = LatentConfig()
    assert (config.time_factor, config.frequencies) == (8, 32)
    hparams = pytest.importorskip("music2latent.hparams")
    names = ["hop", "alpha_rescale", "beta_rescale", "base_channels", "multipliers_list", "layers_list_encoder"]
    names += ["attention_list_encoder", "freq_downsample_list", "heads", "sample_rate", "bottleneck_channels"]
    for name in [*names, "bottleneck_base_channels", "num_bottleneck_layers"]:
        value = getattr(hparams, name)
        assert getattr(config, name) == (tuple(value) if isinstance(value, list) else value), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("encoder.conv_out.bias"), r"music2latent\.pt: .*lacks conv_out\.bias"),
        (lambda s: s.update({"encoder.more": torch.zeros(1)}), r"music2latent\.pt: .*unexpected more"),
        (lambda s: s.clear(), r"music2latent\.pt: .*lacks gain\.scale and \d+ more"),
    ],
)
def test_other_checkpoints_are_refused_in_one_line(tiny, change, message):
    state = torch.load(tiny / "music2latent.pt", weights_only=True)
    change(state["gen_state_dict"])
    torch.save(state, tiny / "music2latent.pt")
    with pytest.raises(UserError, match=message) as caught:
        MusicLatentSpaceModel(tiny, device="cpu")
    assert "\n" not in str(caught.value)


def test_missing_file_and_bad_config(tiny):
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({**config, "freq_downsample_list": [1]}))
    with pytest.raises(UserError, match=r"config\.json: expected lists for 5 resolutions"):
        MusicLatentSpaceModel(tiny, device="cpu")
    (tiny / "config.json").write_text(json.dumps({**config, "base_channels": "four"}))
    with pytest.raises(UserError, match=r"config\.json"):
        MusicLatentSpaceModel(tiny, device="cpu")
    (tiny / "config.json").unlink()
    with pytest.raises(UserError, match=r"music2latent\.pt: .*(lacks|asks for shape)"):
        MusicLatentSpaceModel(tiny, device="cpu")
    (tiny / "music2latent.pt").unlink()
    with pytest.raises(UserError, match=r"music2latent\.pt: not found"):
        MusicLatentSpaceModel(tiny, device="cpu")
