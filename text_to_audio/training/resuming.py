"""Going on with a run: how far it is, which checkpoint is taken, what must agree."""

import hashlib
import shlex
from dataclasses import dataclass, fields
from datetime import datetime
from logging import Logger
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from store.reading import EmbeddingStore
from text_to_audio.config import BEFORE, TrainingConfig
from text_to_audio.measuring.summary import FILE_NAME, read_summary
from text_to_audio.model.checkpoints import checkpoint_path, read_checkpoint, save_checkpoint

# settings that do not change what is learnt in the steps that are left, or only how many these are
MAY_CHANGE = {
    "data_path", "checkpoint_dir", "log_dir", "resume", "save_every_steps", "device", "gradient_checkpointing",
    "epochs", "patience", "baseline", "compile", "num_workers", "memory_gb", "recomputed_layers",
}  # fmt: skip
MEASURED = {"text_dim", "audio_dim", "spread"}  # of the model and the store, which are compared themselves
NEEDED = {"optimizer_state_dict", "schedule_state_dict", "random_state", "progress", "spaces", "step", "queue"}


@dataclass
class Progress:
    """How far a run is: epochs that are done, validation included, and what of the next one is.

    started: the time that names the run. data: `data_digest` of its store. batches: done of the next epoch's plan;
    captions: in them; losses: the sums of their losses, one per audio space, a tensor that stays on the device.
    """

    started: str
    data: str
    epoch: int = 0
    batches: int = 0
    captions: int = 0
    losses: Tensor | float = 0.0

    @classmethod
    def of(cls, store: EmbeddingStore, encoders: tuple[str, ...]) -> "Progress":
        """That of a run which begins now."""
        return cls(datetime.now().isoformat(timespec="milliseconds"), data_digest(store, encoders))

    def add(self, captions: int, losses: Tensor) -> None:
        """Count a step's captions and their mean losses (spaces,)."""
        self.batches, self.captions = self.batches + 1, self.captions + captions
        self.losses = self.losses + captions * losses.double()

    def mean_losses(self) -> list[float]:
        """The mean loss per caption so far in each space; waits for the device."""
        return (torch.as_tensor(self.losses) / self.captions).tolist()

    def after_epoch(self, epoch: int) -> "Progress":
        """That of the same run at an epoch's end."""
        return Progress(self.started, self.data, epoch)


@dataclass(frozen=True)
class Checkpoint:
    """A `_last.pt` that was read: where, and what is in it."""

    path: Path
    contents: dict
    config: TrainingConfig


def data_digest(store: EmbeddingStore, encoders: tuple[str, ...]) -> str:
    """A digest of what a run reads: recordings, sources and captions in order, and the spaces' statistics.

    The vectors themselves are gigabytes; others would have another mean.
    """
    digest = hashlib.sha256()
    for name in ("train", "val"):
        split = store.split(name)
        for column in (split.audio_id, split.source_id, split.caption):
            digest.update("\0".join([*column, "\n"]).encode())
        digest.update(np.asarray(split.caption_audio, np.int64).tobytes())
    for encoder in encoders:
        for values in store.statistics(encoder):
            digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()[:16]


def previous_path(last: Path) -> Path:
    """Where the checkpoint before `last` is kept: muq_last.pt -> muq_last.prev.pt."""
    return last.with_name(f"{last.stem}.prev{last.suffix}")


class LastCheckpoint:
    """Saves a run's `_last.pt` and keeps the one before it, as long as that is the same run's and whole."""

    def __init__(self, path: Path, resumed: Checkpoint | None):
        self.path = path
        self._keeps = resumed is not None and resumed.path == path
        self._fresh = resumed is None

    def save(self, contents: dict) -> None:
        """Write the checkpoint; `UserError` where that fails, and what was there stays."""
        previous = previous_path(self.path)
        save_checkpoint(self.path, contents, previous if self._keeps else None)
        if self._fresh:
            previous.unlink(missing_ok=True)  # of a run before this one, and not to be taken for it
        self._keeps, self._fresh = True, False


def find_checkpoint(config: TrainingConfig, log: Logger) -> Checkpoint | None:
    """The checkpoint that `--resume` means, or None for a fresh run. `UserError` where it cannot be gone on with.

    Where it is damaged or gone, the one before it is taken, and the log says so.
    """
    if not config.resume:
        return None
    last = checkpoint_path(config, "last")
    path = last if config.resume == "auto" else Path(config.resume)
    if config.resume == "auto" and not last.exists() and not previous_path(last).exists():
        log.info(f"--resume auto: no {last}, so this is a fresh run")
        return None
    found, fault = first_whole([path, *(each for each in [previous_path(path)] if each.exists())])
    if found is None:
        raise UserError(fault)
    if fault:
        log.warning(f"warning: {fault}; going on from {found.path}")
    _check_settings(found, config)
    if found.config.epochs != config.epochs:
        log.warning(
            f"warning: the run began with --epochs {found.config.epochs}; with {config.epochs} the learning rate goes "
            f"on along a longer or shorter curve, which is not the one of a run of {config.epochs} from the start"
        )
    _check_best(found, config)
    return found


def _check_best(found: Checkpoint, config: TrainingConfig) -> None:
    """The best checkpoints are tested when the run ends, so they must be there and of this run."""
    for name, space in found.contents["spaces"].items():
        path = Path(config.checkpoint_dir) / f"{name}_best_r1.pt"
        if not space["best"]["r1_epoch"]:
            continue
        if not path.exists():
            raise UserError(f"{found.path}: its run needs its best checkpoint {path}, which is missing")
        if read_checkpoint(path, mapped=True).get("started") != found.contents["progress"]["started"]:
            raise UserError(f"{found.path}: its run needs its best checkpoint {path}, which is another run's")


def _read(path: Path, mapped: bool) -> Checkpoint:
    contents = read_checkpoint(path, {"config"}, mapped)
    if missing := sorted(NEEDED - contents.keys()):
        raise UserError(
            f"{path}: expected a checkpoint to go on from ({{encoder}}_last.pt; of a joint run joint_last.pt), found "
            f"none of {missing}"
        )
    return Checkpoint(path, contents, TrainingConfig.from_dict(contents["config"], str(path)))


def _check_settings(found: Checkpoint, config: TrainingConfig) -> None:
    before = found.config
    # what the command line leaves to the run is what it was, and so is a setting that did not exist when it began
    automatic = {"pooling": "auto", "mean_removed": -1}
    left_open = {name for name, auto in automatic.items() if getattr(config, name) == auto}
    for name, value in BEFORE.items():
        if getattr(before, name) == value and getattr(config, name) == getattr(TrainingConfig, name):
            left_open.add(name)
    other = [
        f"{each.name} was {getattr(before, each.name)!r} and is {getattr(config, each.name)!r}"
        for each in fields(config)
        if each.name not in MAY_CHANGE | MEASURED | left_open
        and getattr(before, each.name) != getattr(config, each.name)
    ]
    if other:
        raise UserError(f"{found.path}: cannot go on with other settings: {'; '.join(other)}")


def check_data(found: Checkpoint, store: EmbeddingStore) -> None:
    """Raise `UserError` where the store is not the one the run was trained on; it may have been moved."""
    for name, contents in found.contents["spaces"].items():
        before, space = contents["audio_space"], store.encoders[name]
        other = [
            f"{key} was {before.get(key)!r} and is {space[key]!r}" for key in space if before.get(key) != space[key]
        ]
        if other:
            raise UserError(
                f"{found.path}: cannot go on in another audio space than {store.path} has: {'; '.join(other)}"
            )
    if found.contents["progress"]["data"] != data_digest(store, found.config.audio_encoders):
        raise UserError(
            f"{found.path}: cannot go on with other data: {store.path} has not the recordings, captions or vectors "
            f"that the run began with"
        )


def say_if_done(found: Checkpoint, config: TrainingConfig, log: Logger) -> bool:
    """Whether a run has been trained and tested to its end; the log then says so."""
    if not (is_finished(found, config) and is_measured(found, config)):
        return False
    epoch = found.contents["progress"]["epoch"]
    log.info(
        f"{found.path}: this run is finished after epoch {epoch}, best epoch {best_epoch(found)}; its test metrics "
        f"are in {Path(config.checkpoint_dir) / FILE_NAME}. More --epochs or --patience would go on with it"
    )
    return True


def best_epoch(found: Checkpoint) -> int:
    """The latest of the epochs that the spaces keep."""
    return max(space["best"]["r1_epoch"] for space in found.contents["spaces"].values())


def curve_start(found: Checkpoint | None, name: str) -> tuple[int, dict[str, float]]:
    """From which step on the curves in a space's log folder are hidden, and the scalars of it that are written again.

    At an epoch's end everything up to the checkpoint's step is on disk and nothing else belongs to it. In an epoch, a
    validation may have followed at the same step, which is about to be repeated. A fresh run hides all.
    """
    if found is None:
        return 0, {}
    step = found.contents["step"]
    if not found.contents["progress"]["batches"]:
        return step + 1, {}
    return step, found.contents["spaces"][name]["points"]


def is_finished(found: Checkpoint, config: TrainingConfig) -> bool:
    """Whether no epoch is left to train, by its number or by early stopping."""
    epoch = found.contents["progress"]["epoch"]
    return epoch >= config.epochs or epoch - best_epoch(found) >= config.patience


def is_measured(found: Checkpoint, config: TrainingConfig) -> bool:
    """Whether the summary already has the test metrics of this finished run."""
    path = Path(config.checkpoint_dir) / FILE_NAME
    summary = read_summary(path) if path.exists() else {}
    started = found.contents["progress"]["started"]
    return all(
        (summary.get(name, {}).get("started"), summary.get(name, {}).get("epoch"))
        == (started, space["best"]["r1_epoch"])
        for name, space in found.contents["spaces"].items()
    )


def first_whole(paths: list[Path], mapped: bool = False) -> tuple[Checkpoint | None, str]:
    """The first of these checkpoints that can be read (see `read_checkpoint`), and what is wrong with the others."""
    faults: list[str] = []
    for path in paths:
        try:
            return _read(path, mapped), "; ".join(faults)
        except UserError as error:
            faults.append(str(error))
    return None, "; ".join(faults)


def resume_command(config: TrainingConfig) -> str:
    """The command line that goes on with a run: every setting that is not the default, and --resume auto."""
    defaults = TrainingConfig(config.audio_encoder)
    words = ["python", "train.py", "--audio-encoder", *config.audio_encoders]
    for each in fields(config):
        value = getattr(config, each.name)
        flag = each.metadata.get("flag", True) and each.name not in {"resume", "audio_encoder"}
        if not flag or value == getattr(defaults, each.name):
            continue
        words += [f"--{each.name.replace('_', '-')}", *([] if each.type is bool else [str(value)])]
    return shlex.join([*words, "--resume", "auto"])
