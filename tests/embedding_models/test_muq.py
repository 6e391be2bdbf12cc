import json
import shutil
from pathlib import Path

import librosa
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import UserError
from embedding_models import AudioError, MuQEmbeddingModel, enrich
from embedding_models.muq import MuQBackbone, read_backbone
from embedding_models.weights import load_tensors

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
CLOSE = 1e-5  # of the largest value


@pytest.fixture(scope="module")
def expected():
    return load_file(REFERENCE / "expected.safetensors")


@pytest.fixture(scope="module")
def model():
    return MuQEmbeddingModel(REFERENCE / "muq_mulan", REFERENCE / "muq_large", device="cpu")


def difference(found, right):
    assert found.shape == right.shape
    return ((found - right).abs().max() / right.abs().max()).item()


@pytest.mark.parametrize("wave", ["clip", "short"])
def test_backbone_equals_the_official_hidden_states(expected, wave):
    folder = REFERENCE / "muq_large"
    backbone = MuQBackbone(json.loads((folder / "config.json").read_text())).eval()
    weights = folder / "model.safetensors"
    load_tensors(backbone, read_backbone(weights, "model."), weights)
    with torch.no_grad():
        states = backbone(expected[f"wave_{wave}"][None])
    assert len(states) == 4
    assert difference(states[-1][0], expected[f"muq_{wave}_last_hidden"]) < CLOSE
    assert difference(states[1][0], expected[f"muq_{wave}_hidden_1"]) < CLOSE


@pytest.mark.parametrize("wave", ["clip", "short"])
def test_normalised_time_mean_is_the_official_latent(expected, model, wave):
    frames = model.frames(expected[f"wave_{wave}"][None])
    latent = torch.nn.functional.normalize(frames.mean(dim=1), dim=1)[0]
    assert difference(latent, expected[f"muq_mulan_{wave}_latent"]) < CLOSE


def test_dimensions_come_from_the_config(model):
    assert (model.name, model.sample_rate, model.channels, model.frame_dim, model.dim) == ("muq", 24_000, 1, 32, 96)
    assert model.model == str(REFERENCE / "muq_mulan")


def test_a_batch_equals_its_windows_one_by_one(model):
    waves = torch.randn(3, 48_000, generator=torch.Generator().manual_seed(0)) * 0.1
    together = model.embed_windows(waves)
    assert together.shape == (3, model.dim)
    assert not together.is_inference()
    for wave, vector in zip(waves, together, strict=True):
        assert difference(model.embed_windows(wave[None].numpy())[0], vector) < CLOSE
    assert difference(enrich(model.frames(waves)), together) == 0


def test_other_layers_are_the_ones_the_config_names(tmp_path, expected, model):
    shutil.copytree(REFERENCE / "muq_mulan", tmp_path / "mulan")
    config = json.loads((tmp_path / "mulan" / "config.json").read_text())
    config["audio_model"]["use_layer_idx"] = 1
    (tmp_path / "mulan" / "config.json").write_text(json.dumps(config))
    other = MuQEmbeddingModel(tmp_path / "mulan", REFERENCE / "muq_large", device="cpu")
    wave = expected["wave_short"][None]
    with torch.no_grad():
        right = model._to_latents(model._projection(model._backbone(wave)[1]))
    assert difference(other.frames(wave), right) < CLOSE


def test_mel_filters_equal_the_formula(model):
    """HTK's scale, triangles of height one: torchaudio's defaults, which MuQ was trained with."""
    points = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 12_000 / 700), 130) / 2595) - 1)
    bins = np.linspace(0, 12_000, 1025)
    rising = (bins - points[:-2, None]) / np.diff(points)[:-1, None]
    falling = (points[2:, None] - bins) / np.diff(points)[1:, None]
    right = np.clip(np.minimum(rising, falling), 0, None)
    np.testing.assert_allclose(librosa.filters.mel(sr=24_000, n_fft=2048, htk=True, norm=None), right, atol=1e-6)
    np.testing.assert_allclose(model._backbone.mel.filters, right, atol=1e-6)


def test_silence_is_embedded(model):
    assert torch.isfinite(model.embed_windows(torch.zeros(1, 24_000))).all()


def test_what_cannot_be_embedded(model):
    wave = torch.zeros(2, 24_000)
    wave[1, 5] = torch.inf
    with pytest.raises(AudioError, match="not finite") as caught:
        model.embed_windows(wave)
    assert caught.value.reason == "not finite"
    with pytest.raises(AudioError, match=r"0\.499 s") as caught:
        model.embed_windows(torch.zeros(1, 11_976))
    assert caught.value.reason == "too short"
    with pytest.raises(ValueError, match=r"expected waveforms \(batch, samples\)"):
        model.embed_windows(torch.zeros(1, 2, 24_000))


def changed(tmp_path, change):
    """Copy the MuLan checkpoint; `change` gets its config and tensors and alters them."""
    folder = tmp_path / "mulan"
    folder.mkdir()
    config = json.loads((REFERENCE / "muq_mulan" / "config.json").read_text())
    tensors = load_file(REFERENCE / "muq_mulan" / "model.safetensors")
    change(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: c["audio_transformer"].update(tf_depth=2), r"config\.json: audio_transformer\.tf_depth"),
        (lambda c, t: c.pop("mulan"), r"config\.json: not the config of a MuQ-MuLan model"),
        (lambda c, t: t.pop("mulan.audio.proj.bias"), r"model\.safetensors: .*lacks bias"),
        (lambda c, t: t.pop("mulan.audio.model.model.conv.linear.bias"), r"lacks conv\.linear\.bias"),
        (
            lambda c, t: t.update({"mulan.audio.model.model.conformer.layers.9.x": torch.zeros(1)}),
            r"unexpected conformer\.layers\.9\.x",
        ),
        (
            lambda c, t: t.update({"mulan.audio.transformer.layers.0.x": torch.zeros(1)}),
            "without a transformer",
        ),
        (lambda c, t: c["mulan"].update(dim_latent=16), r"the config asks for shape \(16,"),
    ],
)
def test_other_checkpoints_are_refused_in_one_line(tmp_path, change, message):
    with pytest.raises(UserError, match=message) as caught:
        MuQEmbeddingModel(changed(tmp_path, change), REFERENCE / "muq_large", device="cpu")
    assert "\n" not in str(caught.value)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        MuQEmbeddingModel(tmp_path, REFERENCE / "muq_large", device="cpu")
    folder = changed(tmp_path, lambda c, t: None)
    with pytest.raises(UserError, match=r"config\.json: not the config of a MuQ model"):
        MuQEmbeddingModel(folder, folder, device="cpu")
    (folder / "model.safetensors").write_bytes(b"not a checkpoint at all")
    with pytest.raises(UserError, match=r"model\.safetensors: expected a PyTorch checkpoint"):
        MuQEmbeddingModel(folder, REFERENCE / "muq_large", device="cpu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors or pytorch_model\.bin"):
        MuQEmbeddingModel(folder, REFERENCE / "muq_large", device="cpu")


def test_pickled_weights_load_too(tmp_path, model, expected):
    folder = changed(tmp_path, lambda c, t: None)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    other = MuQEmbeddingModel(folder, REFERENCE / "muq_large", device="cpu")
    wave = expected["wave_short"][None]
    assert torch.equal(other.frames(wave), model.frames(wave))


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folders = REFERENCE / "muq_mulan", REFERENCE / "muq_large"
    assert MuQEmbeddingModel(*folders).device.type == "cpu"
    with pytest.raises(UserError, match="no CUDA device"):
        MuQEmbeddingModel(*folders, device="cuda")
    with pytest.raises(UserError, match="expected device to be"):
        MuQEmbeddingModel(*folders, device="gpu")
    assert MuQEmbeddingModel(*folders, device="cpu", precision="float16").precision == "float32"
    with pytest.raises(UserError, match="precision: expected one of"):
        MuQEmbeddingModel(*folders, device="cpu", precision="bf16")
