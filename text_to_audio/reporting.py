"""What TensorBoard gets beside the training's scalars: similarities, single queries, the settings' outcome."""

from dataclasses import asdict
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from text_to_audio.config import TrainingConfig
from text_to_audio.evaluation import Evaluator
from text_to_audio.queries import Query, best_and_worst, similarity_counts


def log_validation(writer: SummaryWriter, evaluator: Evaluator, metrics: dict[str, float], step: int) -> None:
    """The metrics of the evaluator's last measurement, histograms of its cosines, and its best and worst queries."""
    for name, value in metrics.items():
        writer.add_scalar(f"val/{name}", value, step)
    edges, positive, negative = similarity_counts(evaluator.latest, evaluator.gallery)
    _add_histogram(writer, "val/similarity/positives", edges, positive, step)
    _add_histogram(writer, "val/similarity/negatives", edges, negative, step)
    best, worst = best_and_worst(evaluator.latest, evaluator.gallery, evaluator.audio_id)
    writer.add_text("val/queries/best", _as_markdown(best), step)
    writer.add_text("val/queries/worst", _as_markdown(worst), step)


def log_results(writer: SummaryWriter, config: TrainingConfig, metrics: dict[str, float], step: int) -> None:
    """The test metrics of a run that has ended, as scalars and as the outcome of its settings (hparams)."""
    for name, value in metrics.items():
        writer.add_scalar(f"test/{name}", value, step)
    settings = {name: value for name, value in asdict(config).items() if isinstance(value, int | float | str)}
    # add_hparams would open another run; these three summaries go beside the scalars that they name
    for summary in hparams(settings, {f"test/{name}": value for name, value in metrics.items()}):
        writer.file_writer.add_summary(summary)
    writer.flush()


def read_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of the event files in a folder: tag -> (step, value) in order; empty where there are none.

    What a run that was restarted from an earlier step had written beyond that step is left out, as TensorBoard does.
    """
    if not folder.is_dir():
        return {}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def _add_histogram(writer: SummaryWriter, tag: str, edges: Tensor, counts: Tensor, step: int) -> None:
    centres, counts = ((edges[1:] + edges[:-1]) / 2).double(), counts.double()
    held = torch.nonzero(counts)[:, 0]
    if not len(held):
        return  # a gallery of one recording has no negatives
    writer.add_histogram_raw(
        tag,
        min=edges[held[0]].item(),
        max=edges[held[-1] + 1].item(),
        num=counts.sum().item(),
        sum=(centres * counts).sum().item(),
        sum_squares=(centres.square() * counts).sum().item(),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )


def _as_markdown(queries: list[Query]) -> str:
    blocks = []
    for query in queries:
        lines = [f"**rank {query.rank}** of {_plain(query.audio_id)}: {_plain(query.caption)}", ""]
        lines += [f"- {each.score:.3f} {_plain(each.audio_id)}: {_plain(each.caption)}" for each in query.found]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _plain(text: str) -> str:
    """Text such that Markdown shows it as it is, on one line."""
    escaped = "".join("\\" + letter if letter in "\\`*_{}[]<>()#+-.!|" else letter for letter in text)
    return " ".join(escaped.split())
