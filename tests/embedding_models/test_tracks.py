"""Whole tracks of any length: where windows start, their mean, the thread that decodes ahead."""

import threading
import time

import numpy as np
import pytest
import soundfile
import torch

from embedding_models.audio import AudioError
from embedding_models.averaging import WindowMean
from embedding_models.base import AudioEmbeddingModel
from embedding_models.pipeline import StageSeconds, embed_clips
from embedding_models.track_workers import End, embed_one
from embedding_models.tracks import _ahead, embed_track, window_starts
from helpers.small_library import spec, write_track


def test_where_windows_start():
    assert window_starts(1, 4.0) == [0.0]
    assert window_starts(1, 10.0) == [0.0]
    assert window_starts(3, 25.5) == [0.0, 10.0, 15.5]
    assert window_starts(3, 99.0) == [0.0, 10.0, 20.0]  # a header that promises too much
    assert window_starts(2, 0.0) == [0.0, 0.0]


def test_a_track_is_the_mean_of_what_is_given(tmp_path, tiny_models):
    encoder = spec(tiny_models, "latent").load()
    path = write_track(tmp_path / "x.flac", 3, 37.0)
    track, parts = embed_track(encoder, path, 3)
    parts = list(parts)
    assert (round(track.seconds), [len(part) for part in parts]) == (37, [3, 1])
    np.testing.assert_allclose(np.concatenate(parts).mean(0), encoder.embed_file(path), rtol=1e-4, atol=1e-4)


class _Given(AudioEmbeddingModel):
    """An encoder whose vectors are given: a window's is chosen by its first sample."""

    name, channels, sample_rate, frame_dim = "given", 1, 8000, 100

    def __init__(self, vectors):
        super().__init__("given", None, "cpu", "float32")
        self._given = vectors

    def _vectors(self, waveforms):
        numbers = np.rint(np.asarray(waveforms)[:, 100] * 100).astype(int)
        return self._given[torch.from_numpy(numbers)]


@pytest.mark.parametrize("windows", [1, 2, 3, 7, 11])
def test_preparing_indexing_and_single_files_take_one_mean(tmp_path, windows):
    """Given the same windows' vectors, of very unlike sizes, the same float32 to the last bit; batched as they like."""
    generator = torch.Generator().manual_seed(windows)
    vectors = torch.randn(windows, 300, generator=generator) * 10.0 ** torch.randint(-6, 7, (windows, 1))
    samples = np.repeat(np.arange(windows) / 100, 80_000)
    path = tmp_path / "x.wav"
    soundfile.write(path, samples, 8000, subtype="FLOAT")
    encoder = _Given(vectors)
    single = encoder.embed_file(path)
    expected = vectors.double().numpy()
    total = expected[0].copy()
    for vector in expected[1:]:
        total += vector
    np.testing.assert_array_equal(single, (total / windows).astype(np.float32))
    for batch_size in (1, 2, 3, 8):
        *_, end = embed_one(encoder, 0, path, batch_size, False)
        assert isinstance(end, End)
        np.testing.assert_array_equal(end.mean, single)
        (((_, prepared),),) = embed_clips([(0, path)], [encoder], batch_size, 1, StageSeconds())
        assert prepared["given"].dtype == np.float32
        np.testing.assert_array_equal(prepared["given"], single)


def test_a_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        WindowMean().mean()


@pytest.mark.parametrize("seconds", [10.0, 65.0])
def test_a_prepared_and_an_indexed_track_agree(tmp_path, tiny_models, seconds):
    """Within one step of float16, in which a library keeps its vectors."""
    encoder = spec(tiny_models, "latent").load()
    path = write_track(tmp_path / "x.flac", 3, seconds)
    *_, end = embed_one(encoder, 0, path, 8, False)
    ((_, prepared),) = [each for batch in embed_clips([(0, path)], [encoder], 5, 1, StageSeconds()) for each in batch]
    stored, kept = prepared["latent"], end.mean.astype(np.float16)
    step = np.maximum(np.abs(np.spacing(kept.astype(np.float16))), np.float16(6e-8)).astype(np.float64)
    assert (np.abs(kept.astype(np.float64) - stored) <= step).all()


def test_the_length_is_what_was_decoded_and_errors_name_the_file(tmp_path, tiny_models):
    encoder = spec(tiny_models, "latent").load()
    path = write_track(tmp_path / "x.wav", 3, 25.0)
    data = bytearray(path.read_bytes())
    place = data.index(b"data") + 4
    data[place : place + 4] = (500_000).to_bytes(4, "little")  # a header from before the end
    path.write_bytes(data)
    *_, end = embed_one(encoder, 0, path, 8, False)
    assert (end.seconds, end.starts) == (25.0, [0.0, 10.0, 15.0])

    def refuse(waveforms):
        raise AudioError("not finite", "latent: the encoder's output is not finite")

    encoder.embed_windows = refuse
    (failure,) = embed_one(encoder, 0, path, 8, False)
    assert failure.reason == f"{path}: latent: the encoder's output is not finite"


def test_the_thread_ahead_stops_when_nobody_listens():
    made = []

    def items():
        for number in range(1000):
            made.append(number)
            yield number

    ahead = _ahead(items(), 2)
    assert [next(ahead), next(ahead)] == [0, 1]
    threads = threading.active_count()
    ahead.close()
    time.sleep(0.5)
    assert threading.active_count() < threads
    assert len(made) < 10

    def failing():
        yield 1
        raise AudioError("unreadable", "broken")

    with pytest.raises(AudioError, match="broken"):
        list(_ahead(failing(), 2))
