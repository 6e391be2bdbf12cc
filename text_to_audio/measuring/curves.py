"""TensorBoard curves, written and read: they neither double nor lose a point when a run is killed and resumed."""

import logging
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter


class CurveWriter(SummaryWriter):
    """A SummaryWriter that hides what the folder has of `step` and later, and begins with the scalars of that step.

    `points_of` remembers the newest step's scalars for a checkpoint, since hiding goes by whole steps. Histograms and
    texts of that one step are not remembered.
    """

    def __init__(self, folder: str, step: int = 0, scalars: dict[str, float] | None = None):
        super().__init__(folder, purge_step=step)
        self.newest: tuple[int, dict[str, float]] = (step, {})
        for tag, value in (scalars or {}).items():
            self.add_scalar(tag, value, step)

    def add_scalar(self, tag: str, scalar_value: float, global_step: int = 0, *more: Any, **options: Any) -> None:
        """Write a point; a step's points come before those of later steps."""
        if global_step != self.newest[0]:
            self.newest = global_step, {}
        self.newest[1][tag] = float(scalar_value)
        super().add_scalar(tag, scalar_value, global_step, *more, **options)

    def points_of(self, step: int) -> dict[str, float]:
        """The scalars of this step, if it is the newest."""
        return dict(self.newest[1]) if self.newest[0] == step else {}


def read_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of the event files in a folder: tag -> (step, value) in order; empty where there are none.

    What a run that was restarted from an earlier step had written beyond that step is left out, as TensorBoard does.
    """
    if not folder.is_dir():
        return {}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    said = logging.getLogger("tensorboard")
    said.addFilter(_is_not_of_purging)
    try:
        events.Reload()
    finally:
        said.removeFilter(_is_not_of_purging)
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def _is_not_of_purging(record: logging.LogRecord) -> bool:
    """Whether to let a line of TensorBoard's through: that points are left out is meant, and no news to a user."""
    return "Purging expired events" not in record.getMessage()
