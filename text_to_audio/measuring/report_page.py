"""{encoder}_report.html: one self-contained page about a checkpoint - curves, ranks, metrics, queries, settings."""

import argparse
import html
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np

from common.errors import UserError, run_script
from common.files import replacing
from store.reading import EmbeddingStore, StoreHeader
from text_to_audio.config import TrainingConfig
from text_to_audio.measuring.charts import bar_chart, line_chart
from text_to_audio.measuring.evaluation import Evaluator, by_subset
from text_to_audio.measuring.examples import Query, best_and_worst, similarity_counts
from text_to_audio.measuring.metrics import chance_level, rounded, text_to_audio_ranks
from text_to_audio.measuring.summary import COLUMNS
from text_to_audio.model.checkpoints import read_checkpoint
from text_to_audio.model.inference import load_checkpoint
from text_to_audio.training.log_lines import read_curves

STYLE = """
:root{color-scheme:light dark;--back:#fff;--ink:#1c1e21;--soft:#667;--rule:#dde;--card:#f6f7f9;--a:#1f6feb;--b:#d9730d}
@media(prefers-color-scheme:dark){:root{--back:#15171a;--ink:#e8e8ea;--soft:#9aa;--rule:#333840;--card:#1d2025;
--a:#6aa9ff;--b:#ffa657}}
body{margin:0 auto;max-width:980px;padding:16px;
background:var(--back);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}p.soft,li.soft,figcaption,small{color:var(--soft)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr));gap:16px}figure{margin:0}
svg{width:100%;height:auto}svg text{fill:var(--soft);font-size:13px}.grid{stroke:var(--rule)}
.line{fill:none;stroke-width:2}.line.s0{stroke:var(--a)}.line.s1{stroke:var(--b)}.s0{fill:var(--a)}.s1{fill:var(--b)}
polyline.s0,polyline.s1{fill:none}.legend span{margin-left:12px;white-space:nowrap}
.legend i{display:inline-block;width:10px;height:10px;margin-right:4px}
i.s0{background:var(--a)}i.s1{background:var(--b)}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%}td,th{padding:4px 8px;text-align:right;
border-bottom:1px solid var(--rule)}td:first-child,th:first-child{text-align:left}
article{background:var(--card);border-radius:8px;padding:10px 14px;margin:10px 0;overflow-wrap:anywhere}
article p,article ol{margin:4px 0}.settings td{text-align:left;overflow-wrap:anywhere}
"""


def write_report(
    checkpoint: Path, config: TrainingConfig, header: StoreHeader, epoch: int, evaluator: Evaluator, metrics: dict,
    split: str = "test",
) -> Path:  # fmt: skip
    """Write the page beside the checkpoint from the evaluator's last measurement; returns its path.

    The curves are read from the run's TensorBoard folder. `UserError` where the page cannot be written.
    """
    path = checkpoint.parent / f"{config.audio_encoder}_report.html"
    name, gallery = html.escape(config.audio_encoder), evaluator.gallery
    best, worst = best_and_worst(evaluator.latest, gallery, evaluator.audio_id)
    revision = f", revision {header.revision}" if header.revision else ""
    body = [
        f"<h1>Text to {name}</h1><p class=soft>{html.escape(checkpoint.name)}, epoch {epoch}. {len(gallery.captions)} "
        f"captions and {len(gallery)} recordings of the {split} split of {html.escape(header.dataset + revision)}. "
        f"Text encoder: {html.escape(config.text_model)}.</p>",
        f"<h2>Metrics, text to audio</h2>{_metrics_table(metrics, config.audio_encoder, len(gallery))}",
        f"<h2>Curves</h2>{_curves(Path(config.log_dir) / config.audio_encoder)}",
        f"<h2>Ranks and similarities</h2><div class=charts>{_rank_chart(evaluator)}"
        f"{_similarity_chart(evaluator)}</div>",
        f"<h2>Best queries</h2>{_queries(best)}<h2>Worst queries</h2>{_queries(worst)}",
        f"<h2>Settings</h2><div class=wide>{_settings(config)}</div>",
    ]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Text to {name}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>'
        f"<body>{''.join(body)}</body></html>\n"
    )
    try:
        with replacing(path) as beside:
            beside.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: could not write the report ({error.strerror})") from error
    return path


def _metrics_table(metrics: dict, name: str, gallery: int) -> str:
    rows = by_subset({**metrics, "gallery": gallery}, name) | {f"chance of {gallery}": chance_level(gallery)}
    lines = ["<tr><th></th>" + "".join(f"<th>{column.removeprefix('t2a_')}</th>" for column in COLUMNS) + "</tr>"]
    for row, entry in rows.items():
        cells = "".join(f"<td>{rounded(entry)[column]}</td>" for column in COLUMNS)
        lines.append(f"<tr><td>{html.escape(row)}</td>{cells}</tr>")
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def _curves(folder: Path) -> str:
    curves = read_curves(folder)
    loss = {name: curves[tag] for name, tag in (("train", "train/loss"), ("val", "val/loss")) if tag in curves}
    recall = {name: curves[f"val/t2a_{name}"] for name in ("R@1", "R@10") if f"val/t2a_{name}" in curves}
    mrr = {"MRR": curves["val/t2a_MRR"]} if "val/t2a_MRR" in curves else {}
    charts = line_chart("Loss", loss, "") + line_chart("Validation R@1 and R@10", recall, " %", zero=True)
    charts += line_chart("Validation MRR", mrr, "", zero=True)
    if not charts:
        return f"<p class=soft>No TensorBoard points in {html.escape(str(folder))}.</p>"
    return f"<div class=charts>{charts}</div>"


def _rank_chart(evaluator: Evaluator) -> str:
    own = evaluator.gallery.captions.caption_audio
    ranks = text_to_audio_ranks(evaluator.latest, evaluator.latest.new_tensor(own).long()).numpy()
    size, edges = len(evaluator.gallery), [0, 1, 2, 5]
    while edges[-1] < size:  # 0, 1, 2, 5, 10, 20, 50, ...
        edges.append(edges[-3] * 10)
    edges = [*[edge for edge in edges if edge < size], size]
    pairs = list(pairwise(edges))
    counts = np.histogram(ranks, np.array(edges) + 0.5)[0].astype(float).tolist()
    chance = [(high - low) / size * len(ranks) for low, high in pairs]
    labels = [str(high) if high == low + 1 else f"{low + 1}-{high}" for low, high in pairs]
    return bar_chart("Captions by rank", labels, {"captions": counts, "chance": chance}, "", "rank of the recording")


def _similarity_chart(evaluator: Evaluator) -> str:
    edges, positive, negative = similarity_counts(evaluator.latest, evaluator.gallery, bins=40)
    held = np.flatnonzero((positive + negative).numpy())
    shown = slice(held[0], held[-1] + 1)  # the bins between the lowest and the highest cosine
    edges, positive, negative = edges[shown.start : shown.stop + 1], positive[shown], negative[shown]
    shares = [(100 * counts / counts.sum().clamp_min(1)).tolist() for counts in (positive, negative)]
    labels = [f"{edge:.2f}" for edge in edges[:-1].tolist()]
    series = dict(zip(("own recording", "others"), shares, strict=True))
    return bar_chart("Cosines", labels, series, " %", "cosine of caption and recording")


def _queries(queries: list[Query]) -> str:
    blocks = []
    for query in queries:
        found = "".join(
            f"<li>{html.escape(each.caption)} <small>{html.escape(each.audio_id)}, {each.score:.3f}"
            f"{', the right one' if each.audio_id == query.audio_id else ''}</small></li>"
            for each in query.found
        )
        blocks.append(
            f"<article><p><b>rank {query.rank}</b> {html.escape(query.caption)} "
            f"<small>{html.escape(query.audio_id)}</small></p><ol>{found}</ol></article>"
        )
    return "".join(blocks) or "<p class=soft>None.</p>"


def _settings(config: TrainingConfig) -> str:
    rows = (f"<tr><td>{name}</td><td>{html.escape(str(value))}</td></tr>" for name, value in config.as_dict().items())
    return f"<table class=settings>{''.join(rows)}</table>"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
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
    text_encoder, projection, config = load_checkpoint(args.checkpoint, args.device)
    evaluator = Evaluator(text_encoder, store, args.split, config)
    metrics = evaluator.measure(text_encoder, projection)
    path = write_report(
        Path(args.checkpoint), config, store.header, contents.get("epoch", 0), evaluator, metrics, args.split
    )
    sys.stdout.write(f"written: {path}\n")


if __name__ == "__main__":
    run_script(main)
