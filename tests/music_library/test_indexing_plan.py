"""index_library.py --plan: what it says, and that it writes nothing."""

import re
from pathlib import Path

import pytest

import index_library
from common.errors import UserError
from examples.make_tiny_models import encoder_spec
from helpers.small_library import base_text_model, write_checkpoint, write_music, write_track
from music_library.planning.plan import PlannedIndex, PlannedSpace, index_bytes, look_at


@pytest.fixture(scope="module")
def checkpoint(tiny_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return write_checkpoint(folder / "muq.pt", tiny_models, base_text_model(folder / "base"))


@pytest.fixture
def plan(tmp_path, monkeypatch, capsys, tiny_models):
    monkeypatch.chdir(tmp_path)

    def run(*words):
        before = sorted(Path().rglob("*"))
        flags = ["--device", "cpu", "--muq-backbone", str(tiny_models / "muq_large"), "--plan"]
        assert index_library.main([*map(str, words), *flags]) == 0
        assert sorted(Path().rglob("*")) == before
        return " ".join(capsys.readouterr().out.split())

    return run


def test_tracks_hours_disk_and_memory(plan, checkpoint):
    write_music(Path("music"), 4)
    write_track(Path("music/long.wav"), 9, 27.0)
    Path("music/tune.mid").write_bytes(b"MThd")
    said = plan("music", "--checkpoint", checkpoint)
    assert "192 dimensions" in said
    assert "5 files, " in said
    assert "0 of them are indexed and unchanged; 1 others are left out" in said
    assert "7 windows of 10 s: an estimate by the headers of 5 files" in said
    assert re.search(r"s a window, timed just now on [1-5] of the tracks", said)
    assert f"plain vectors {5 * 192 * 2 / 1e6:.1f} MB" in said
    assert "in each of 1 processes, as just now" in said
    moments = plan("music", "--checkpoint", checkpoint, "--moments", "--narrow")
    assert f"plain vectors {12 * 192 * 2 / 1e6:.1f} MB + " in moments
    assert "18 dimensions)" in moments  # 16 of the head and two


def test_without_a_checkpoint_the_encoder_is_the_published_one(plan, monkeypatch):
    monkeypatch.setattr("embedding_models.pace.matmul_tflops", lambda device, seconds: 0.5)
    write_music(Path("music"), 2)
    said = plan("music", "--audio-encoder", "muq")
    assert "muq: OpenMuQ/MuQ-MuLan-large, 1,536 dimensions (no checkpoints/muq_best_r1.pt yet: as published)" in said
    assert "not here, so by arithmetic: 0.6 TFLOP a window at the published size" in said
    assert 1.2 <= float(re.search(r"([\d.]+) s a window", said)[1]) < 1.5
    assert "not known until the encoder's weights are here" in said
    assert "76,800 dimensions" in plan("music", "--audio-encoder", "mert")


def test_what_it_refuses(plan, checkpoint, tmp_path):
    Path("music").mkdir()
    for words, said in (
        (["--audio-encoder", "muq", "--reindex"], "--plan: expected MUSIC_DIR"),
        (["music", "--checkpoint", "none.pt"], "none.pt"),
        (["music", "--audio-encoder", "muq"], "expected audio files, found none"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            plan(*words)
    Path("music/broken.wav").write_bytes(b"RIFF no sound")
    with pytest.raises(UserError, match="none of the 1 tracks that were tried can be read"):
        plan("music", "--checkpoint", checkpoint)


def test_what_is_indexed_already_is_not_counted(tmp_path, tiny_models, checkpoint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_music(Path("music"), 3)
    words = ["--checkpoint", str(checkpoint), "--device", "cpu", "--muq-backbone", str(tiny_models / "muq_large")]
    index_library.main(["music", *words])
    write_track(Path("music/new.wav"), 7)
    space = PlannedSpace("muq", encoder_spec(tiny_models, "muq", "cpu"), 192, 16, "")
    index = PlannedIndex(
        space, Path("music"), Path("data/library.vectors"), "data/library.db", "HNSW", False, False, 8, 1
    )
    found = look_at(index)
    assert len(found.all) == 4
    assert [path.name for path, _ in found.todo] == ["new.wav"]


def test_the_index_takes_what_was_measured():
    assert 100_000 * index_bytes(1536, "HNSW") == pytest.approx(1.25e9, rel=0.01)
