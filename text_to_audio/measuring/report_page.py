"""{encoder}_report.html: one self-contained page about a checkpoint - curves, ranks, metrics, queries, settings."""

import argparse
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
from markupsafe import Markup
from torch import Tensor

from common.errors import UserError, run_script
from common.files import replacing
from common.templates import templates_beside
from store.reading import EmbeddingStore, StoreHeader
from text_to_audio.config import TrainingConfig
from text_to_audio.measuring.charts import bar_chart, line_chart
from text_to_audio.measuring.curves import read_curves
from text_to_audio.measuring.evaluation import Evaluator, Gallery, by_subset
from text_to_audio.measuring.examples import best_and_worst, similarity_counts
from text_to_audio.measuring.metrics import chance_level, rounded, text_to_audio_ranks
from text_to_audio.measuring.summary import COLUMNS
from text_to_audio.model.checkpoints import read_checkpoint
from text_to_audio.model.inference import load_checkpoint

_TEMPLATES = templates_beside(__file__)


def write_report(
    checkpoint: Path, config: TrainingConfig, header: StoreHeader, epoch: int, evaluator: Evaluator, metrics: dict,
    split: str = "test",
) -> Path:  # fmt: skip
    """Write the page beside the checkpoint from the evaluator's last measurement; returns its path.

    The curves are read from the run's TensorBoard folder. `UserError` where the page cannot be written.
    """
    path = checkpoint.parent / f"{config.audio_encoder}_report.html"
    page = _page(checkpoint.name, config, header, epoch, evaluator, metrics, split)
    try:
        with replacing(path) as beside:
            beside.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: could not write the report ({error.strerror})") from error
    return path


def _page(
    checkpoint: str, config: TrainingConfig, header: StoreHeader, epoch: int, evaluator: Evaluator, metrics: dict,
    split: str,
) -> str:  # fmt: skip
    scores, gallery, name = evaluator.latest, evaluator.gallery, config.audio_encoder
    assert scores is not None, "the evaluator has measured nothing"
    best, worst = best_and_worst(scores, gallery, evaluator.audio_id)
    log_folder = Path(config.log_dir) / name
    return _TEMPLATES.get_template("report.html").render(
        name=name, checkpoint=checkpoint, epoch=epoch, split=split, best=best, worst=worst, log_folder=log_folder,
        captions=len(gallery.captions), recordings=len(gallery), settings=config.as_dict(),
        dataset=header.dataset + (f", revision {header.revision}" if header.revision else ""),
        columns=[column.removeprefix("t2a_") for column in COLUMNS], rows=_metrics_rows(metrics, name, len(gallery)),
        curves=_curve_charts(log_folder),
        distributions=[_rank_chart(scores, gallery), _similarity_chart(scores, gallery)],
    )  # fmt: skip


def _metrics_rows(metrics: dict, name: str, gallery: int) -> dict[str, list[float]]:
    """What the table shows of each subset and of chance, in the order of `COLUMNS`."""
    rows = by_subset({**metrics, "gallery": gallery}, name) | {f"chance of {gallery}": chance_level(gallery)}
    return {row: [rounded(entry)[column] for column in COLUMNS] for row, entry in rows.items()}


def _curve_charts(folder: Path) -> list[Markup]:
    """The charts of a run's TensorBoard points that have any."""
    curves = read_curves(folder)
    loss = {name: curves[tag] for name, tag in (("train", "train/loss"), ("val", "val/loss")) if tag in curves}
    recall = {name: curves[f"val/t2a_{name}"] for name in ("R@1", "R@10") if f"val/t2a_{name}" in curves}
    mrr = {"MRR": curves["val/t2a_MRR"]} if "val/t2a_MRR" in curves else {}
    charts = [
        line_chart("Loss", loss, ""),
        line_chart("Validation R@1 and R@10", recall, " %", zero=True),
        line_chart("Validation MRR", mrr, "", zero=True),
    ]
    return [chart for chart in charts if chart]


def _rank_chart(scores: Tensor, gallery: Gallery) -> Markup:
    own = gallery.captions.caption_audio
    ranks = text_to_audio_ranks(scores, scores.new_tensor(own).long()).numpy()
    size, edges = len(gallery), [0, 1, 2, 5]
    while edges[-1] < size:  # 0, 1, 2, 5, 10, 20, 50, ...
        edges.append(edges[-3] * 10)
    edges = [*[edge for edge in edges if edge < size], size]
    pairs = list(pairwise(edges))
    counts = np.histogram(ranks, np.array(edges) + 0.5)[0].astype(float).tolist()
    chance = [(high - low) / size * len(ranks) for low, high in pairs]
    labels = [str(high) if high == low + 1 else f"{low + 1}-{high}" for low, high in pairs]
    return bar_chart("Captions by rank", labels, {"captions": counts, "chance": chance}, "", "rank of the recording")


def _similarity_chart(scores: Tensor, gallery: Gallery) -> Markup:
    edges, positive, negative = similarity_counts(scores, gallery, bins=40)
    held = np.flatnonzero((positive + negative).numpy())
    shown = slice(held[0], held[-1] + 1)  # the bins between the lowest and the highest cosine
    edges, positive, negative = edges[shown.start : shown.stop + 1], positive[shown], negative[shown]
    shares = [(100 * counts / counts.sum().clamp_min(1)).tolist() for counts in (positive, negative)]
    labels = [f"{edge:.2f}" for edge in edges[:-1].tolist()]
    series = dict(zip(("own recording", "others"), shares, strict=True))
    return bar_chart("Cosines", labels, series, " %", "cosine of caption and recording")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measure a checkpoint and write its report page beside it.",
        epilog="example: python -m text_to_audio.measuring.report_page --checkpoint checkpoints/muq_best_r1.pt",
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a checkpoint written by train.py")
    parser.add_argument("--data-path", metavar="FILE", help="the store (default: the one it was trained on)")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="(default: %(default)s)")
    parser.add_argument("--device", default="auto", metavar="STR", help="auto, cpu, cuda or cuda:N (%(default)s)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Write the page and name it."""
    args = build_parser().parse_args(argv)
    contents = read_checkpoint(args.checkpoint)
    store = EmbeddingStore(args.data_path or contents["config"]["data_path"])
    found, expected = store.dim(contents["config"]["audio_encoder"]), contents["config"]["audio_dim"]
    if found != expected:
        raise UserError(f"{store.path}: expected vectors {expected} wide, as {args.checkpoint} has, found {found}")
    model = load_checkpoint(args.checkpoint, args.device, contents)
    evaluator = Evaluator(model.text_encoder, store, args.split, model.config)
    metrics = evaluator.measure(model.text_encoder, model.projection)
    path = write_report(Path(args.checkpoint), model.config, store.header, model.epoch, evaluator, metrics, args.split)
    sys.stdout.write(f"written: {path}\n")


if __name__ == "__main__":
    run_script(main)
