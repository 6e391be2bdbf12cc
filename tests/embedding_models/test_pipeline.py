import io
import threading
import time

import numpy as np
import pytest
import soundfile
import torch

from embedding_models.audio import AudioError
from embedding_models.base import AudioEmbeddingModel
from embedding_models.pipeline import StageSeconds, embed_clips

RATE = 8000


class LevelEncoder(AudioEmbeddingModel):
    """Mean and mean square of a window, so that a result can be checked by hand. Fails above a level."""

    name, channels, sample_rate, frame_dim = "muq", 1, RATE, 1

    def __init__(self, limit=float("inf"), runs_ahead=False):
        super().__init__("level", None, "cpu", "float32")
        self.limit, self.ahead, self.batches, self.taken = limit, runs_ahead, [], []

    @property
    def runs_ahead(self):
        return self.ahead

    def begin(self, waveforms):
        self.batches.append(tuple(waveforms.shape))
        return Level(self, waveforms)


class Level:
    """What `LevelEncoder` began; a fault is found when the vectors are taken, as on CUDA."""

    seconds = 0.001

    def __init__(self, encoder, waveforms):
        self.encoder, self.waveforms = encoder, waveforms

    def vectors(self):
        self.encoder.taken.append(len(self.encoder.batches))
        if self.waveforms.max() > self.encoder.limit:
            raise AudioError("not finite", "too loud for this encoder")
        return torch.stack([self.waveforms.mean(1), self.waveforms.square().mean(1)], 1)


def wav(samples, rate=RATE):
    buffer = io.BytesIO()
    soundfile.write(buffer, np.asarray(samples, np.float32), rate, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def level(value, seconds=10.0):
    return wav(np.full(int(seconds * RATE), value))


@pytest.fixture(params=[False, True], ids=["in turn", "runs ahead"])
def runs_ahead(request):
    return request.param


def run(clips, encoder, batch_size=4, workers=2):
    lists = list(embed_clips(clips, [encoder], batch_size, workers, StageSeconds()))
    results = [item for finished in lists for item in finished]
    assert len({key for key, _ in results}) == len(results)
    return dict(results)


def test_every_clip_comes_once_with_its_own_vector(tmp_path, runs_ahead):
    clips = [(number, level(number / 100, 10 if number % 3 else 4)) for number in range(30)]
    (tmp_path / "x.wav").write_bytes(level(0.5))
    results = run([*clips, ("path", tmp_path / "x.wav")], LevelEncoder(runs_ahead=runs_ahead))
    assert set(results) == {*range(30), "path"}
    for key, value in [*((number, number / 100) for number in range(30)), ("path", 0.5)]:
        np.testing.assert_allclose(results[key]["muq"], [value, value**2], rtol=1e-5)


def test_an_encoder_that_runs_ahead_has_the_next_batch_before_its_vectors_are_taken():
    encoder = LevelEncoder(runs_ahead=True)
    run([(number, level(0.1)) for number in range(12)], encoder, batch_size=4, workers=1)
    assert encoder.taken == [2, 3, 3]  # batches begun by then
    encoder = LevelEncoder()
    run([(number, level(0.1)) for number in range(12)], encoder, batch_size=4, workers=1)
    assert encoder.taken == [1, 2, 3]


def test_encoders_of_one_format_are_given_one_copy():
    class Copies(LevelEncoder):
        def to_device(self, waveforms):
            self.copies = getattr(self, "copies", 0) + 1
            return super().to_device(waveforms)

    encoders = [Copies(), Copies()]
    list(embed_clips([(n, level(0.1)) for n in range(4)], encoders, 2, 1, StageSeconds()))
    assert [getattr(encoder, "copies", 0) for encoder in encoders] == [2, 0]


def test_windows_of_equal_length_are_batched():
    encoder = LevelEncoder()
    run(
        [(number, level(0.1, 10 if number % 2 else 4)) for number in range(16)],
        encoder,
        batch_size=4,
        workers=1,
    )
    assert encoder.batches == [(4, 4 * RATE), (4, 10 * RATE)] * 2


def test_a_long_track_is_the_mean_of_its_windows(runs_ahead):
    track = wav(np.concatenate([np.full(10 * RATE, 0.1), np.full(10 * RATE, 0.3), np.full(5 * RATE, 0.7)]))
    result = run([("long", track)], LevelEncoder(runs_ahead=runs_ahead), batch_size=2)["long"]["muq"]
    windows = [0.1, 0.3, (0.3 + 0.7) / 2]  # the last window is the track's final ten seconds
    squares = [0.01, 0.09, (0.09 + 0.49) / 2]
    np.testing.assert_allclose(result, [np.mean(windows), np.mean(squares)], rtol=1e-5)


def test_one_bad_clip_harms_no_other(runs_ahead):
    clips = [("a", level(0.1)), ("text", b"not audio"), ("b", level(0.2)), ("short", level(0.1, 0.05))]
    clips += [("nan", wav([float("nan")] * 10 * RATE)), ("loud", level(0.9)), ("c", level(0.3))]
    results = run(clips, LevelEncoder(0.5, runs_ahead))
    reasons = {key: item.reason for key, item in results.items() if isinstance(item, AudioError)}
    assert reasons == {"text": "unreadable", "short": "too short", "nan": "not finite", "loud": "not finite"}
    for key, value in (("a", 0.1), ("b", 0.2), ("c", 0.3)):
        np.testing.assert_allclose(results[key]["muq"][0], value, rtol=1e-5)


def test_a_track_that_breaks_off_late_is_one_error(runs_ahead):
    broken = level(0.1, 35)
    clips = [("broken", broken[: len(broken) - 2 * RATE]), *((number, level(0.2)) for number in range(5))]
    results = run(clips, LevelEncoder(runs_ahead=runs_ahead), batch_size=3)
    assert results["broken"].reason == "unreadable"
    assert all(isinstance(results[number], dict) for number in range(5))


def test_many_odd_lengths_do_not_pile_up(runs_ahead):
    encoder = LevelEncoder(runs_ahead=runs_ahead)
    results = run([(n, level(0.1, 1 + n / 100)) for n in range(60)], encoder, batch_size=4)
    assert len(results) == 60
    assert max(shape[0] for shape in encoder.batches) <= 4


def test_a_broken_source_yields_what_came_before_then_raises(runs_ahead):
    def source():
        for number in range(6):
            yield number, level(0.1)
        raise RuntimeError("the archive is cut")

    seen = []

    def consume():
        for finished in embed_clips(source(), [LevelEncoder(runs_ahead=runs_ahead)], 4, 2, StageSeconds()):
            seen.extend(key for key, _ in finished)

    with pytest.raises(RuntimeError, match="archive is cut"):
        consume()
    assert sorted(seen) == list(range(6))


def test_a_fault_in_the_code_is_raised_not_swallowed(monkeypatch):
    def explode(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("embedding_models.pipeline.track_windows", explode)
    with pytest.raises(ZeroDivisionError):
        run([("a", level(0.1))], LevelEncoder())


def test_leaving_early_ends_the_threads():
    before = threading.active_count()
    results = embed_clips(((n, level(0.1)) for n in range(1000)), [LevelEncoder()], 2, 2, StageSeconds())
    next(results)
    results.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() == before


def test_reading_does_not_run_far_ahead():
    read = []

    def source():
        for number in range(200):
            read.append(number)
            yield number, level(0.1)

    results = embed_clips(source(), [LevelEncoder()], 2, 2, StageSeconds())
    next(results)
    time.sleep(0.5)
    assert len(read) < 20
    results.close()


def test_seconds_are_filled_in():
    seconds = StageSeconds()
    list(embed_clips([(0, level(0.1))], [LevelEncoder()], 1, 1, seconds))
    assert seconds.decode > 0
    assert seconds.wait > 0
    assert seconds.encode["muq"] > 0


def test_a_clip_goes_only_to_the_encoders_that_are_wanted():
    class OtherEncoder(LevelEncoder):
        name, sample_rate = "mert", RATE // 2

    asked = {0: ["muq", "mert"], 1: ["mert"], 2: ["muq"], 3: [], 4: ["mert"]}
    clips = [(key, b"nobody decodes this" if key == 3 else level(0.1 * (key + 1))) for key in asked]
    first, other = LevelEncoder(), OtherEncoder()
    lists = list(embed_clips(clips, [first, other], 2, 2, StageSeconds(), asked.__getitem__))
    results = dict(item for finished in lists for item in finished)
    assert {key: list(result) for key, result in results.items()} == asked
    assert sum(batch[0] for batch in first.batches) == 2
    assert sum(batch[0] for batch in other.batches) == 3
    assert (2, RATE // 2 * 10) in other.batches  # what wants the same is one batch
    np.testing.assert_allclose(results[4]["mert"], [0.5, 0.25], atol=1e-3)
