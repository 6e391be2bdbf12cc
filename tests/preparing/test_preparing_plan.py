import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

import prepare_dataset
from common.errors import UserError
from embedding_models.registry import ENCODERS
from preparing.resources import published_windows


@pytest.fixture
def plan(tmp_path, monkeypatch, capsys):
    """Print the plan in a folder of its own, where nothing may be written; returns it in one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("embedding_models.pace.TIMED_SECONDS", 0.05)
    monkeypatch.setattr("preparing.resources.TIMED_SECONDS", 0.05)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*words):
        before = sorted(Path().rglob("*"))
        assert prepare_dataset.main([*map(str, words), "--plan"]) == 0
        assert sorted(Path().rglob("*")) == before
        return " ".join(capsys.readouterr().out.split())

    return run


def test_with_nothing_prepared(plan, monkeypatch):
    monkeypatch.setattr("embedding_models.pace.matmul_tflops", lambda device, seconds: 0.5)
    monkeypatch.setattr("preparing.resources.decoding_of_a_clip", lambda: 0.0)
    said = plan("--device", "cpu")
    hours = 53_168 * (0.6 + 1.1 + 2.6) / 0.5 / 3600
    assert f"time about {hours:,.2f} h in one process on cpu for 53,168 windows of 10 s" in said
    assert "muq 1.2 s a window (not here, so by arithmetic: 0.6 TFLOP a window at the published size, 0.50" in said
    assert "later, for training: Qwen/Qwen3-Embedding-4B 8.04 GB" in said
    assert "later, for training: checkpoints of muq, mert, latent 6.01 GB" in said
    # the tar, the store twice, of which there is one at the end, and then the text model and the checkpoints
    assert "at most 50.3 GB with downloads (16.8 GB) and 3 downloads of unknown size" in said
    on_card = 53_168 * sum(1 / rate for rate in (189, 71, 31)) / 3600
    assert f"the networks alone take {on_card:.2f} h on one H100 80 GB" in said
    assert "made 20 clips/s there in an earlier version, by which 0.74 h" in said
    assert "muq not timed)" in plan("--device", "cpu", "--dtype", "float16")
    assert "not known: no card was timed with it" in plan("--device", "cpu", "--encoders", "musicnn")


def test_limit_counts_recordings_of_each_split(plan):
    assert published_windows(0.1, None).windows == 53_168
    assert published_windows(0.1, 500).windows == 500 + 500 + 400
    assert published_windows(0.0, 500).windows == 500 + 400


def test_a_folder_of_ones_own_is_timed_and_measured_in_windows(plan, tmp_path, tiny_models):
    rows = ["audio,caption,split"]
    for number, (split, seconds) in enumerate((("train", 25), ("val", 10), ("test", 4))):
        soundfile.write(tmp_path / f"{number}.wav", np.random.default_rng(0).normal(0, 0.1, seconds * 8000), 8000)
        rows.append(f"{number}.wav,noise,{split}")
    (tmp_path / "own.csv").write_text("\n".join(rows))
    words = [
        "--dataset",
        "own.csv",
        "--encoders",
        "muq",
        "--muq-backbone",
        tiny_models / "muq_large",
        "--device",
        "cpu",
    ]
    said = plan(*words, "--muq-model", tiny_models / "muq_mulan")
    assert "own.csv, 3 recordings, about 0.0 h by the headers of 3" in said
    assert "for 5 windows of 10 s" in said
    assert re.search(r"muq [\d.e-]+ s a window \(timed just now\)", said)
    assert f"store {3 * 192 * 4 / 1e6:.1f} MB" in said  # the width of the folder, not the published one
    assert "not known: no card was timed with this model" in said
    assert "download" not in said
    with pytest.raises(UserError, match=r"config\.json"):
        plan(*words, "--muq-model", tmp_path)


def test_what_a_card_did_is_told_for_known_precisions():
    for encoder in ENCODERS.values():
        for rates in encoder.timed.values():
            assert set(rates) <= {"float32", "tf32", "float16"}
            assert all(rate > 0 for rate in rates.values())
