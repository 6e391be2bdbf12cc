import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from helpers.stores import make_header
from text_to_audio.config import TrainingConfig
from text_to_audio.loading.captions import CaptionSet
from text_to_audio.measuring.charts import line_chart, nice_ticks
from text_to_audio.measuring.curves import read_curves
from text_to_audio.measuring.examples import best_and_worst, similarity_counts
from text_to_audio.measuring.metrics import retrieval_metrics
from text_to_audio.measuring.report_page import write_report
from text_to_audio.training.log_lines import log_results, log_validation


class Gallery(SimpleNamespace):
    def __len__(self):
        return 8


@pytest.fixture
def measured():
    """An evaluator's outcome: 16 captions of 8 recordings, with markup in a caption."""
    torch.manual_seed(0)
    scores = torch.rand(16, 8) * 0.5
    audio = np.repeat(np.arange(8), 2)
    scores[0, 0], scores[15, 7] = 0.99, -0.9
    captions = CaptionSet([f"<script>alert({i})</script> & *song*" for i in range(16)], audio, audio)
    return SimpleNamespace(
        gallery=Gallery(captions=captions), latest=scores, audio_id=[f"data/{i}.wav" for i in range(8)]
    )


def test_best_and_worst(measured):
    best, worst = best_and_worst(measured.latest, measured.gallery, measured.audio_id)
    assert (best[0].rank, best[0].audio_id, best[0].found[0].audio_id) == (1, "data/0.wav", "data/0.wav")
    assert (worst[0].rank, worst[0].audio_id) == (8, "data/7.wav")
    assert [query.rank for query in best] == sorted(query.rank for query in best)
    assert len({query.caption for query in best + worst}) == 10
    assert [len(query.found) for query in best] == [3] * 5


def test_similarities(measured):
    edges, positive, negative = similarity_counts(measured.latest, measured.gallery)
    own = measured.latest[np.arange(16), measured.gallery.captions.caption_audio]
    np.testing.assert_array_equal(positive, np.histogram(own, edges.numpy())[0])
    assert (positive.sum(), negative.sum()) == (16, 16 * 7)


def test_tensorboard_and_the_page(measured, tmp_path):
    config = TrainingConfig("muq", log_dir=str(tmp_path / "logs"), text_model="<b>model</b>", device="cpu")
    metrics = retrieval_metrics(measured.latest, torch.from_numpy(measured.gallery.captions.caption_audio))
    metrics["loss"] = 1.5
    folder = tmp_path / "logs" / "muq"
    with SummaryWriter(str(folder)) as writer:
        for step in range(0, 50, 10):
            writer.add_scalar("train/loss", 3 - step / 50, step)
        log_validation(writer, measured, metrics, 50)
        log_results(writer, config, metrics, 50)
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    assert set(tags["histograms"]) == {"val/similarity/positives", "val/similarity/negatives"}
    assert {"val/queries/best/text_summary", "val/queries/worst/text_summary"} <= set(tags["tensors"])
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert read_curves(folder)["val/loss"] == [(50, 1.5)]
    assert read_curves(tmp_path / "gone") == {}
    path = write_report(tmp_path / "muq_best_r1.pt", config, make_header(), 3, measured, metrics)
    page = path.read_text()
    assert path == tmp_path / "muq_report.html"
    assert "<script" not in page
    assert "<b>model" not in page
    assert not re.search(r"https?:|src=|href=|url\(", page)
    assert page.count("<svg") == 5
    assert page.count("<article>") == 10
    assert f"<td>{metrics['t2a_R@1']:.2f}".rstrip("0") in page
    assert "chance of 8" in page
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ["muq_report.html"]


def test_charts():
    assert nice_ticks(0, 97) == [0, 20, 40, 60, 80, 100]
    assert nice_ticks(3, 3)[0] <= 3 <= nice_ticks(3, 3)[-1]
    assert line_chart("empty", {}, "") == ""
    assert "nan" not in line_chart("one", {"a": [(0, float("nan")), (5, 2.0)]}, "")
