import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from common.errors import UserError
from embedding_models import AudioError, MertModel

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
CLOSE = 1e-5  # of the largest value


@pytest.fixture(scope="module")
def expected():
    return load_file(REFERENCE / "expected.safetensors")


@pytest.fixture(scope="module")
def model():
    return MertModel(REFERENCE / "mert", device="cpu")


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(REFERENCE / "mert", tmp_path / "mert")


def difference(found, right):
    assert found.shape == right.shape
    return ((found - right).abs().max() / right.abs().max()).item()


@pytest.mark.parametrize("wave", ["clip", "short"])
def test_every_layer_equals_the_official_one(expected, model, wave):
    layers = expected[f"mert_{wave}_hidden_states"]  # (layers, frames, width)
    frames = model.frames(expected[f"wave_{wave}"][None])
    assert frames.shape == (1, layers.shape[1], 4 * 64)
    for number, layer in enumerate(layers):
        assert difference(frames[0, :, number * 64 : (number + 1) * 64], layer) < CLOSE


def test_dimensions_come_from_the_config(model):
    assert (model.name, model.sample_rate, model.channels, model.frame_dim, model.dim) == ("mert", 24_000, 1, 256, 768)


def test_a_batch_equals_its_windows_one_by_one(model):
    waves = torch.randn(3, 48_000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.01], [0.1], [1]])
    together = model.embed_windows(waves)
    for wave, vector in zip(waves, together, strict=True):
        assert difference(model.embed_windows(wave[None])[0], vector) < CLOSE


def test_normalisation_is_the_preprocessors_choice(folder, model):
    wave = torch.randn(1, 24_000, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.05
    assert difference(model.frames(wave * 3), model.frames(wave)) < 1e-4
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "do_normalize": False}))
    plain = MertModel(folder, device="cpu")
    normalised = (wave - wave.mean()) / torch.sqrt(wave.var(correction=0) + 1e-7)
    assert difference(plain.frames(normalised), model.frames(wave)) < CLOSE
    assert difference(plain.frames(wave), model.frames(wave)) > 1e-4


def test_present_names_and_safetensors_load_too(folder, model):
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    names = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    for old, new in names.items():
        place = "encoder.pos_conv_embed.conv."
        tensors[place + new] = tensors.pop(place + old)
    tensors.pop("masked_spec_embed")
    (folder / "pytorch_model.bin").unlink()
    save_file(tensors, folder / "model.safetensors")
    wave = torch.randn(1, 24_000)
    assert torch.equal(MertModel(folder, device="cpu").frames(wave), model.frames(wave))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "wav2vec2", 'model_type: expected "mert_model"'),
        ("feature_extractor_cqt", True, "feature_extractor_cqt: expected false"),
        ("deepnorm", True, "deepnorm: expected false"),
        ("num_hidden_layers", 4, r"pytorch_model\.bin: .*lacks encoder\.layers\.3\."),
        ("num_hidden_layers", 2, r"pytorch_model\.bin: .*unexpected encoder\.layers\.2\."),
        ("intermediate_size", 64, "the config asks for shape"),
        ("num_attention_heads", "four", "not the config of a MERT model"),
    ],
)
def test_other_checkpoints_are_refused_in_one_line(folder, field, value, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(UserError, match=message) as caught:
        MertModel(folder, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut short"])
def test_unreadable_weights(folder, content):
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: expected a PyTorch checkpoint") as caught:
        MertModel(folder, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("precision", ["tf32", "float16"])
def test_a_result_of_lower_precision_that_is_not_finite_is_computed_again(model, monkeypatch, precision):
    """CUDA is not needed to see the rule: only what `_encode` gives in a lower precision is replaced."""
    right, wave = model._encode, torch.randn(2, 24_000)
    expected, used = model.embed_windows(wave), []

    def overflowing(waveforms):
        used.append(model.precision)
        if model.precision == precision:
            return torch.full((len(waveforms), 5, model.frame_dim), torch.nan)
        return right(waveforms)

    monkeypatch.setattr(model, "precision", precision)
    monkeypatch.setattr(model, "_encode", overflowing)
    assert torch.equal(model.embed_windows(wave), expected)
    assert used == [precision, "float32"]
    assert model.precision == precision


def test_half_precision_is_close(model, monkeypatch):
    """The weights in half precision, which a CPU can compute with too."""
    waves = torch.randn(2, 48_000, generator=torch.Generator().manual_seed(0)) * 0.1
    right = model.embed_windows(waves)
    monkeypatch.setattr(model, "precision", "float16")
    found = model.embed_windows(waves)
    assert not torch.equal(found, right)
    assert found.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found, right).min() >= 0.9999


def test_input_that_is_not_finite_is_an_error(model):
    waves = torch.zeros(2, 24_000)
    waves[1, 500] = torch.nan
    with pytest.raises(AudioError, match="input samples that are not finite") as caught:
        model.embed_windows(waves)
    assert caught.value.reason == "not finite"


def test_output_that_is_not_finite_is_an_error(model, monkeypatch):
    monkeypatch.setattr(model, "_encode", lambda waveforms: torch.full((1, 5, model.frame_dim), torch.inf))
    with pytest.raises(AudioError, match="output is not finite") as caught:
        model.embed_windows(torch.zeros(1, 24_000))
    assert caught.value.reason == "not finite"


def test_a_track_is_the_mean_of_its_windows(model):
    samples = np.random.default_rng(0).normal(size=43 * 24_000).astype(np.float32) * 0.1
    file = io.BytesIO()
    soundfile.write(file, samples, 24_000, format="WAV", subtype="FLOAT")
    starts = [0, 10, 20, 30, 33]  # seconds; the last window is the final ten
    windows = np.stack([samples[s * 24_000 : (s + 10) * 24_000] for s in starts])
    right = torch.cat([model.embed_windows(w[None]) for w in windows]).mean(dim=0)
    file.seek(0)
    vector = model.embed_file(file)
    assert vector.dtype == np.float32
    assert difference(torch.from_numpy(vector), right) < CLOSE
