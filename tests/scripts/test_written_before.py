"""Files written by commit 1a63506 still load, go on and answer; see tests/data/written_by_1a63506/README.md."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import evaluate
import index_library
import prepare_dataset
import search
import train
from helpers.small_library import write_track
from helpers.small_musicbench import SmallMusicBench
from preparing.work_file import tail_is_cut
from store.reading import SPLITS, EmbeddingStore
from store.verifying import faults

WRITTEN = Path(__file__).parents[1] / "data/written_by_1a63506"
EXPECTED = json.loads((WRITTEN / "expected.json").read_text())
STORE = "data/musicbench_embeddings/embeddings.h5"
CHECKPOINTS = {
    "muq": "single/muq_best_r1.pt",
    "mert": "joint/mert_best_r1.pt",
    "latent": "joint/latent_best_r1.pt",
}
PREPARE = [
    *("--device", "cpu", "--batch-size", "4", "--num-workers", "1", "--val-fraction", "0.3"),
    *("--encoders", "muq", "mert", "latent", "--latent-model", "models/music2latent"),
    *("--muq-model", "models/muq_mulan", "--muq-backbone", "models/muq_large", "--mert-model", "models/mert"),
]
# Pure tones leave most mel bands to the rounding noise of the FFT, which is another on another kind of processor: MuQ's
# features, in decibels, show it (0.0016). The nearest vector of another recording is 0.006 away.
TOLERANCE = {"muq": 3e-3, "mert": 1e-5, "latent": 1e-5}
DONE_ROWS = 7  # of the half-done shard's train split
TRAIN = (
    f"--device cpu --text-model models/text --data-path {STORE} --epochs 3 --batch-size 4 "
    "--gradient-accumulation-steps 2 --hidden-dim 16 --lora-rank 2 --max-length 32 --lr 1e-2 --text-lr 1e-3 "
    "--warmup-steps 2 --save-every-steps 2"
).split()


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """A copy of what was written, to work in."""
    shutil.copytree(WRITTEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    return tmp_path


def test_the_store_is_whole():
    store = EmbeddingStore(STORE)
    assert list(faults(STORE)) == []
    assert {name: len(store.split(name).audio_id) for name in SPLITS} == {"train": 14, "val": 6, "test": 3}
    assert store.split("test").caption[:2] == ["test 10 main", "test 10 alt"]
    assert {name: store.dim(name) for name in store.encoders} == {"muq": 48, "mert": 192, "latent": 72}


@pytest.mark.parametrize("encoder", list(CHECKPOINTS))
def test_a_checkpoint_measures_what_it_measured(encoder):
    found = evaluate.main(["--checkpoint", CHECKPOINTS[encoder], "--device", "cpu"])
    for name, value in EXPECTED[encoder]["evaluated"].items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize(("run", "encoders"), [("single", ["muq"]), ("joint", ["mert", "latent"])])
def test_an_interrupted_training_goes_on_to_the_same_numbers(run, encoders):
    folders = ["--checkpoint-dir", run, "--log-dir", f"{run}/logs"]
    train.main(["--audio-encoder", *encoders, *TRAIN, *folders, "--resume", "auto"])
    summary = json.loads(Path(f"{run}/training_summary.json").read_text())
    for encoder in encoders:
        expected = EXPECTED[encoder]
        for name, value in expected["summary"].items():
            assert summary[encoder][name] == pytest.approx(value, rel=1e-4), name
        events = EventAccumulator(f"{run}/logs/{encoder}", size_guidance={"scalars": 0})
        events.Reload()
        for tag, values in expected["curves"].items():
            found = [event.value for event in events.Scalars(tag)]
            # 12 steps and 3 epochs; the state kept is that of step 6, within the second epoch
            assert len(found) == {12: 7, 3: 2}[len(values)], tag
            assert found == pytest.approx(values[-len(found) :], rel=1e-5), tag


def test_a_half_done_shard_goes_on():
    """Its store is the one that a run without interruption left; no finished row is computed again."""
    SmallMusicBench(train_sources=10, copies=1, test=3).write(Path("musicbench"), tar=False)
    shard = EmbeddingStore("half/embeddings.shard-0-of-1.h5")
    done = {name: np.array(shard.vectors("train", name)[:DONE_ROWS]) for name in shard.encoders}
    assert all(rows.any(axis=1).all() for rows in done.values())
    assert prepare_dataset.main(["--dataset", "musicbench", "--output-dir", "half", *PREPARE]) == 0
    finished, whole = EmbeddingStore("half/embeddings.h5"), EmbeddingStore(STORE)
    assert finished.header == whole.header
    assert list(faults(finished.path)) == []
    for name in SPLITS:
        for column in ("audio_id", "source_id", "caption", "caption_kind"):
            assert getattr(finished.split(name), column) == getattr(whole.split(name), column)
        for encoder in whole.encoders:
            found, expected = finished.vectors(name, encoder), whole.vectors(name, encoder)
            assert np.abs(found - expected).max() <= TOLERANCE[encoder] * np.abs(expected).max()
    for encoder, rows in done.items():
        np.testing.assert_array_equal(finished.vectors("train", encoder)[:DONE_ROWS], rows)


def test_a_shard_killed_between_its_cut_and_its_rename_is_known():
    """As that version left it: done, its tail cut off, and not yet renamed."""
    half = Path("half/embeddings.shard-0-of-1.h5")
    assert not tail_is_cut(half)
    os.truncate(half, os.path.getsize(STORE))
    assert tail_is_cut(half)


def answers(capsys, encoder, *flags):
    capsys.readouterr()
    search.main(["calm piano song", "--checkpoint", CHECKPOINTS[encoder], *WHERE, "--json", "--k", "6", *flags])
    found = json.loads(capsys.readouterr().out)[0]["results"]
    return [(Path(hit["path"]).name, hit["score"], hit["moment"]) for hit in found]


WHERE = ["--milvus-uri", "library.db", "--device", "cpu"]


def assert_answers(found, expected):
    assert [(name, moment) for name, _, moment in found] == [(name, moment) for name, _, moment in expected]
    assert [score for _, score, _ in found] == pytest.approx([score for _, score, _ in expected], abs=1e-3)


def test_a_library_answers_and_goes_on(capsys):
    assert_answers(answers(capsys, "muq"), EXPECTED["muq"]["search"])
    assert_answers(answers(capsys, "muq", "--moments"), EXPECTED["muq"]["moments"])
    assert_answers(answers(capsys, "mert"), EXPECTED["mert"]["search"])

    Path("music").mkdir()
    for number in range(5):
        write_track(Path(f"music/track {number}.wav"), number)
    write_track(Path("music/long.wav"), 9, 25.0)
    write_track(Path("music/new.wav"), 20)
    flags = ["--checkpoint", CHECKPOINTS["muq"], *WHERE, "--muq-backbone", "models/muq_large"]
    index_library.main(["music", *flags, "--moments"])
    found = [hit for hit in answers(capsys, "muq", "--k", "20") if hit[0] != "new.wav"]
    assert_answers(found[::2], EXPECTED["muq"]["search"])  # each track from the old place, then from here
    assert_answers(found[1::2], EXPECTED["muq"]["search"])


def test_a_library_without_its_index_is_indexed_anew(capsys):
    shutil.rmtree("library.db")
    index_library.main(["--reindex", "--checkpoint", CHECKPOINTS["mert"], *WHERE, "--narrow"])
    assert_answers(answers(capsys, "mert"), EXPECTED["mert"]["search"])
