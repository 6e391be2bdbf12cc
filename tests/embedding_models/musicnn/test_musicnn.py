"""MusiCNN against what the package's own graph computes, librosa's spectrogram, and a plain port of the graph."""

import importlib.util
import io
import json
import shutil
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
import soxr
import torch
from safetensors.torch import load_file

from benchmarks.preparing.musicnn_speed import plain_frames, plain_tags
from common.errors import UserError
from embedding_models.musicnn import network as network_module
from embedding_models.musicnn.model import PUBLISHED, MusiCNNModel, find_folder, read_weights
from embedding_models.registry import ENCODERS

REFERENCE = Path(__file__).parents[2] / "data" / "reference" / "musicnn" / "expected.safetensors"
CLOSE = 1e-5  # of the largest value
NETWORKS = pytest.mark.parametrize("name", PUBLISHED)


@pytest.fixture(scope="module")
def expected():
    return load_file(REFERENCE)


@pytest.fixture(scope="module")
def models():
    # Where the package is not installed this fails with the line that says how to install it (the Makefile does).
    return {name: MusiCNNModel(name, device="cpu") for name in PUBLISHED}


@pytest.fixture(scope="module")
def weights():
    return {name: read_weights(find_folder(name)[0]) for name in PUBLISHED}


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(find_folder("MSD_musicnn")[0], tmp_path / "copy")


@pytest.fixture(scope="module")
def music():
    """Two sounds of 10 s at 16 kHz, chords that come and go, one of them near silence."""
    seconds = np.arange(160_000) / 16_000
    chords = [np.sin(2 * np.pi * f * seconds) * (np.sin(2 * np.pi * seconds * f / 500) > 0) for f in (220, 331, 1760)]
    noise = np.random.default_rng(0).normal(size=160_000)
    return torch.from_numpy(np.stack([sum(chords) / 4, 1e-3 * noise])).float()


def difference(found, right):
    assert found.shape == right.shape
    return ((found - right).abs().max() / right.abs().max()).item()


def test_frames_equal_the_packages(expected, models):
    frames = models["MSD_musicnn"].network(expected["spectrogram"])
    for found, right in zip(frames, expected["msd_frames"], strict=True):
        assert difference(found, right) < CLOSE


@NETWORKS
def test_tags_equal_the_packages(expected, models, name):
    network = models[name].network
    found = network.tags(network(expected["spectrogram"]))
    assert (found - expected[f"{name[:3].lower()}_tags"]).abs().max() < CLOSE


@NETWORKS
@pytest.mark.parametrize("frames", [1, 31, 626])
def test_frames_equal_a_plain_port_at_any_length(models, weights, name, frames, monkeypatch):
    """Everything between silence and the loudest that float16 holds, so that a filter that can move does."""
    generator = torch.Generator().manual_seed(frames)
    spectrograms = 8.8 * torch.rand(2, frames, 96, generator=generator) ** torch.tensor([1.0, 4.0])[:, None, None]
    spectrograms[0, frames // 2 :] = 0
    found = models[name].network(spectrograms)
    for one, right in zip(found, plain_frames(weights[name], spectrograms), strict=True):
        assert difference(one, right) < CLOSE
    monkeypatch.setitem(network_module._FRAMES_AT_ONCE, "cpu", 100)  # a long window in pieces
    assert difference(models[name].network(spectrograms), found) < CLOSE


@NETWORKS
def test_no_filter_that_can_move_is_left_out(models, weights, name):
    """What is taken as constant gives that for the input that would move it most, sign by sign of its weights."""
    network, tensors = models[name].network, {key: value.double() for key, value in weights[name].items()}
    ends = torch.tensor([0, np.log10(10_000 * 65_504 + 1)]) * network.norm.scale.item() + network.norm.shift.item()
    low, high = min(0, ends.min().item()), max(0, ends.max().item())  # 0: the padding
    for number, branch in enumerate(network.front):
        conv, norm = "conv2d" + (f"_{number}" if number else ""), f"batch_normalization_{number + 1}"
        kernel = tensors[f"{conv}/kernel"].flatten(0, 2)
        for first, second in ((low, high), (high, low)):
            given = (kernel * torch.where(kernel > 0, first, second)).sum(dim=0) + tensors[f"{conv}/bias"]
            values = [tensors[f"{norm}/{part}"] for part in ("moving_mean", "moving_variance", "gamma", "beta")]
            right = torch.nn.functional.batch_norm(given.relu()[None], *values, eps=1e-3)[0]
            assert (right - branch.constants)[~branch.live].abs().max() < 1e-6


def test_most_of_the_published_filters_cannot_move(models):
    live = [len(branch.bias) for branch in models["MSD_musicnn"].network.front]
    assert live == [23, 14, 3, 7, 17]
    assert [len(branch.bias) for branch in models["MTT_musicnn"].network.front][:2] == [125, 84]


def test_spectrogram_equals_librosas(models, music):
    spectrogram = models["MSD_musicnn"].spectrogram
    for wave in (music[0], music[1], 30 * music[0][:9_999], torch.zeros(8_000)):
        power = librosa.feature.melspectrogram(y=wave.numpy(), sr=16_000, n_fft=512, hop_length=256, n_mels=96).T
        found = spectrogram.power(wave[None])[0]
        assert found.shape == power.shape
        assert (found - torch.from_numpy(power)).abs().max() <= CLOSE * power.max()
        right = np.log10(10_000 * np.float32(np.minimum(power, 65_504).astype(np.float16)) + 1)
        # A value near the middle of two float16 numbers may go to the other one, 2 ** -10 of its power: mostly in
        # silent bands beside loud ones, where float32 leaves the Fourier transform few digits.
        error = (spectrogram(wave[None])[0] - torch.from_numpy(right)).abs()
        assert error.max() <= 2**-10 / np.log(10) + 1e-5
        assert (error > 1e-5).float().mean() < 0.1


@NETWORKS
def test_tags_of_a_longer_sound_are_the_mean_over_patches(models, weights, music, name):
    spectrograms = models[name].spectrogram(music)  # 626 frames: three patches of 187, 65 left over
    patches = [
        plain_tags(weights[name], plain_frames(weights[name], spectrograms[:, s : s + 187])) for s in (0, 187, 374)
    ]
    assert (models[name].tags(music) - torch.stack(patches).mean(dim=0)).abs().max() < CLOSE
    short = plain_tags(weights[name], plain_frames(weights[name], models[name].spectrogram(music[:, :16_000])))
    assert (models[name].tags(music[:, :16_000].numpy()) - short).abs().max() < CLOSE
    with pytest.raises(ValueError, match=r"expected waveforms \(batch, samples\)"):
        models[name].tags(music[0])


def test_tags_have_the_packages_names(models):
    package = Path(importlib.util.find_spec("musicnn").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("configuration", package / "configuration.py")
    configuration = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(configuration)
    assert models["MSD_musicnn"].tag_names == tuple(configuration.MSD_LABELS)
    assert models["MTT_musicnn"].tag_names == tuple(configuration.MTT_LABELS)


def test_the_entry_is_right(models):
    model = models["MSD_musicnn"]
    assert (model.name, model.sample_rate, model.channels, model.frame_dim) == ("musicnn", 16_000, 1, 753)
    assert (model.model, model.revision) == ("MSD_musicnn", "0.1.0")
    assert model.dim == ENCODERS["musicnn"].dim == 2259
    assert ENCODERS["musicnn"].commercial


@NETWORKS
def test_a_batch_equals_its_windows_one_by_one(models, music, name):
    waves = torch.cat([music, 0.3 * music.flip(1)])[:, :80_000]
    together, tags = models[name].embed_windows(waves), models[name].tags(waves)
    for wave, vector, tag in zip(waves, together, tags, strict=True):
        assert difference(models[name].embed_windows(wave[None])[0], vector) < CLOSE
        assert (models[name].tags(wave[None])[0] - tag).abs().max() < CLOSE


def test_ten_seconds_of_stereo_as_the_steps_by_hand(models, weights):
    seconds = np.arange(441_000) / 44_100
    left = np.sin(2 * np.pi * (300 + 40 * seconds) * seconds) * np.exp(-(seconds % 0.7) * 4)
    noise = np.random.default_rng(1).normal(size=441_000)
    stereo = np.stack([0.5 * left, 0.3 * np.roll(left, 9_000) + 0.01 * noise], axis=1).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, stereo, 44_100, format="WAV", subtype="FLOAT")
    file.seek(0)
    found = models["MSD_musicnn"].embed_file(file)

    mono = soxr.resample(stereo.mean(axis=1), 44_100, 16_000)
    power = librosa.feature.melspectrogram(y=mono, sr=16_000, n_fft=512, hop_length=256, n_mels=96).T
    spectrogram = np.log10(10_000 * power.astype(np.float16).astype(np.float32) + 1)
    frames = plain_frames(weights["MSD_musicnn"], torch.from_numpy(spectrogram)[None])[0].numpy()
    low, high = np.percentile(frames, (25, 75), axis=0)
    blocks = (frames.mean(axis=0), (high - low) / 1.3489795, np.abs(np.diff(frames, axis=0)).mean(axis=0))
    right = np.concatenate(blocks)
    assert found.shape == right.shape == (2259,)
    assert found.dtype == np.float32
    # float32's last digits here and there decide a rounding to float16, which moves a band by 4e-4.
    assert np.abs(found - right).max() < 5 * CLOSE * np.abs(right).max()


def test_a_folder_with_the_same_files_is_the_same_model(folder, models, music):
    model = MusiCNNModel(folder, device="cpu", revision=None)
    assert model.revision is None
    assert torch.equal(model.frames(music), models["MSD_musicnn"].frames(music))


def test_without_the_package_the_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"MSD_musicnn: .*not installed: pip install --no-deps musicnn==0\.1\.0"):
        MusiCNNModel(device="cpu")


def test_names_and_versions_that_are_none():
    with pytest.raises(UserError, match=r"nowhere: expected a folder .* or one of MSD_musicnn, MTT_musicnn"):
        MusiCNNModel("nowhere", device="cpu")
    with pytest.raises(UserError, match=r"expected version 9\.9 of the package musicnn, found 0\.1\.0"):
        MusiCNNModel("MSD_musicnn", device="cpu", revision="9.9")


def test_another_network_is_refused_in_one_line(folder):
    vgg = find_folder("MTT_musicnn")[0].with_name("MTT_vgg")
    with pytest.raises(UserError, match=r"MTT_vgg/\.index: not the weights of MusiCNN") as caught:
        MusiCNNModel(vgg, device="cpu")
    assert "\n" not in str(caught.value)
    (folder / ".data-00000-of-00001").unlink()
    with pytest.raises(UserError, match=r"\.data-00000-of-00001: not found"):
        MusiCNNModel(folder, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio_rep": None}, r"audio_rep\.resample_sr: expected 16000, found None"),
        ({"audio_rep": {"hop": 512}}, r"audio_rep\.hop: expected 256, found 512"),
        ({"audio_rep": {"identifier": "fma"}}, r"audio_rep\.identifier: expected msd or mtt, found 'fma'"),
        ({"n_frames": "many"}, "n_frames: expected a number of frames, found 'many'"),
    ],
)
def test_another_kind_of_input_is_refused(folder, change, message):
    config = json.loads((folder / "config.json").read_text())
    if change.get("audio_rep"):
        change = {"audio_rep": config["audio_rep"] | change["audio_rep"]}
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=rf"config\.json: {message}"):
        MusiCNNModel(folder, device="cpu")
