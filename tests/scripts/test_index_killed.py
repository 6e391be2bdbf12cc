"""kill -9 while indexing: the same command then leaves no duplicate and nothing missing."""

import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from helpers.forked_script import ForkedScript
from helpers.small_library import base_text_model, write_checkpoint, write_music
from music_library.index_space import IndexSpace, read_head
from music_library.milvus_index import FIELD, VectorDatabase
from music_library.vector_files import VectorFiles

KILLS = 10


def kill_runs(script, parent, words):
    """kill -9 at instants spread over a run, in one folder; then a run may end. Returns how many were killed."""
    folder, killed = parent / "folder", 0
    whole = run(script, parent / "trial", words)
    for number in range(KILLS):
        if number == KILLS // 2:  # once all is there, kill runs that have something to replace
            for path in (folder / "music").iterdir():
                path.write_bytes(path.read_bytes() + b"\0\0")
        script.start(folder, words)
        began = time.monotonic()
        time.sleep(whole * (number + 0.5) / KILLS)
        script.kill()
        code = script.wait()
        assert code in (-signal.SIGKILL, 0), (folder / "stderr.txt").read_text()
        killed += code != 0
        whole = whole if code else min(whole, time.monotonic() - began)
    run(script, folder, words)
    return killed


def run(script, folder, words):
    """Seconds of a run that nothing stops."""
    script.start(folder, words)
    began = time.monotonic()
    assert script.wait() == 0, (folder / "stderr.txt").read_text()
    return time.monotonic() - began


@pytest.mark.slow
def test_killed_ten_times(tmp_path, tiny_models):
    checkpoint = write_checkpoint(tmp_path / "muq.pt", tiny_models, base_text_model(tmp_path / "base"))
    for name in ("trial", "folder"):
        write_music(tmp_path / name / "music", 8, seconds=4.0, suffixes=(".wav", ".flac"))
    words = ["music", "--checkpoint", checkpoint, "--moments", "--device", "cpu", "--batch-size", "1"]
    words += ["--muq-backbone", tiny_models / "muq_large"]
    with ForkedScript("index_library") as script:
        killed = kill_runs(script, tmp_path, words)
    assert killed >= KILLS // 2  # the others were faster than the one before
    data = tmp_path / "folder/data"
    expected = {str(path) for path in (tmp_path / "folder/music").iterdir()}
    head, _, recorded = read_head(checkpoint)
    space = IndexSpace("muq", head, recorded["recipe"], recorded["id"])
    with VectorDatabase(str(data / "library.db")) as database, VectorFiles(data / "library.vectors", "muq") as files:
        rows = list(database.rows("muq", ["id", "path", "version", FIELD]))
        windows = list(database.rows("muq_moments", ["id", "track", FIELD]))
        tracks = {track.id: track for track in files.tracks()}
        assert sorted(row["path"] for row in rows) == sorted(expected)
        assert database.count("muq") == len(expected)
        assert sorted(each["id"] for each in windows) == sorted(each.row for each in files.windows_of())
        assert {each["track"] for each in windows} == set(tracks)
        for row in rows:
            track = tracks[row["id"]]
            assert (track.version, track.size) == (row["version"], Path(row["path"]).stat().st_size)
            np.testing.assert_allclose(row[FIELD], space.audio(files.vectors[[track.row]])[0], atol=1e-6)
    shutil.rmtree(data)
