"""kill -9 while indexing: the same command then leaves no duplicate and nothing missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.small_library import base_text_model, write_checkpoint, write_music
from music_library.index_space import IndexSpace, read_head
from music_library.milvus_index import FIELD, VectorDatabase
from music_library.vector_files import VectorFiles

TESTS = Path(__file__).parents[1]
KILLS = 10


@pytest.mark.slow
def test_killed_ten_times(tmp_path, tiny_models):
    checkpoint = write_checkpoint(tmp_path / "muq.pt", tiny_models, base_text_model(tmp_path / "base"))
    for name in ("trial", "folder"):
        write_music(tmp_path / name / "music", 8, seconds=4.0, suffixes=(".wav", ".flac"))
    words = ["music", "--checkpoint", checkpoint, "--moments", "--device", "cpu", "--batch-size", "1"]
    words += ["--muq-backbone", tiny_models / "muq_large"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    command = [
        sys.executable,
        TESTS / "helpers" / "kill_indexing.py",
        tmp_path / "trial",
        tmp_path / "folder",
        KILLS,
        *words,
    ]
    answer = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=300)
    assert answer.returncode == 0, answer.stderr[-2000:]
    killed, code = map(int, answer.stdout.splitlines()[-1].split())
    assert code == 0, answer.stderr[-2000:]
    assert killed >= KILLS // 2  # the others were faster than the trial
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
