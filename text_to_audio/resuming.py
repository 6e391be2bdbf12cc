"""Going on with a run: what {encoder}_last.pt holds besides the weights, which one is taken, what must agree."""

import hashlib
import shlex
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from logging import Logger
from pathlib import Path

import numpy as np
import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from text_to_audio.checkpoints import checkpoint_path, read_checkpoint, restore_weights, save_checkpoint
from text_to_audio.config import TrainingConfig
from text_to_audio.errors import UserError
from text_to_audio.losses import Temperature
from text_to_audio.store import EmbeddingStore
from text_to_audio.summary import FILE_NAME, read_summary
from text_to_audio.text_model import ProjectionHead, TextEncoder

# settings that do not change what is learnt in the steps that are left, or only how many these are
MAY_CHANGE = {
    "data_path", "checkpoint_dir", "log_dir", "resume", "save_every_steps", "device", "gradient_checkpointing",
    "epochs", "patience", "baseline",
}  # fmt: skip
MEASURED = {"text_dim", "audio_dim"}  # of the model and the store, which are compared themselves
NEEDED = {"optimizer_state_dict", "schedule_state_dict", "random_state", "progress", "best", "step", "points"}


@dataclass
class Best:
    """The best validation scores so far; (R@1, MRR) decide together, MRR breaking ties."""

    r1: tuple[float, float] = (-1.0, -1.0)
    r1_epoch: int = 0
    loss: float = float("inf")


@dataclass
class Progress:
    """How far a run is: epochs that are done, validation included, and what of the next one is.

    started: the time that names the run. data: `data_digest` of its store. batches: done of the next epoch's plan;
    captions: in them; loss: the sum of their losses.
    """

    started: str
    data: str
    epoch: int = 0
    batches: int = 0
    captions: int = 0
    loss: float = 0.0

    @classmethod
    def of(cls, store: EmbeddingStore, encoder: str) -> "Progress":
        """That of a run which begins now."""
        return cls(datetime.now().isoformat(timespec="milliseconds"), data_digest(store, encoder))

    def add(self, captions: int, loss: float) -> None:
        """Count a step's captions and their mean loss."""
        self.batches, self.captions, self.loss = self.batches + 1, self.captions + captions, self.loss + captions * loss

    def after_epoch(self, epoch: int) -> "Progress":
        """That of the same run at an epoch's end."""
        return Progress(self.started, self.data, epoch)


@dataclass(frozen=True)
class Checkpoint:
    """A `_last.pt` that was read: where, and what is in it."""

    path: Path
    contents: dict
    config: TrainingConfig


def data_digest(store: EmbeddingStore, encoder: str) -> str:
    """A digest of what a run reads: recordings, sources and captions in order, and the space's statistics.

    The vectors themselves are gigabytes; others would have another mean.
    """
    digest = hashlib.sha256()
    for name in ("train", "val"):
        split = store.split(name)
        for column in (split.audio_id, split.source_id, split.caption):
            digest.update("\0".join([*column, "\n"]).encode())
        digest.update(np.asarray(split.caption_audio, np.int64).tobytes())
    for values in store.statistics(encoder):
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()[:16]


def previous_path(last: Path) -> Path:
    """Where the checkpoint before `last` is kept: muq_last.pt -> muq_last.prev.pt."""
    return last.with_name(f"{last.stem}.prev{last.suffix}")


def training_state(optimizer: AdamW, schedule: LambdaLR, progress: Progress, best: Best, device: torch.device) -> dict:
    """What going on needs besides weights and step. Plain types, tensors on the CPU."""
    moments = optimizer.state_dict()
    moments["state"] = {
        number: {name: value.cpu() if torch.is_tensor(value) else value for name, value in state.items()}
        for number, state in moments["state"].items()
    }
    random = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(device)
    return {
        "optimizer_state_dict": moments,
        "schedule_state_dict": schedule.state_dict(),
        "random_state": random,
        "progress": asdict(progress),
        "best": {"r1": list(best.r1), "r1_epoch": best.r1_epoch, "loss": best.loss},
    }


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
    found, fault = _first_whole([path, *(each for each in [previous_path(path)] if each.exists())])
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
    best = checkpoint_path(config, "best_r1")
    if found.contents["best"]["r1_epoch"] and not best.exists():
        raise UserError(f"{found.path}: its run needs its best checkpoint {best}, which is missing")
    return found


def _read(path: Path) -> Checkpoint:
    contents = read_checkpoint(path)
    if missing := sorted(NEEDED - contents.keys()):
        raise UserError(f"{path}: expected a checkpoint to go on from ({{encoder}}_last.pt), found none of {missing}")
    return Checkpoint(path, contents, TrainingConfig.from_dict(contents["config"], str(path)))


def _check_settings(found: Checkpoint, config: TrainingConfig) -> None:
    before = found.config
    other = [
        f"{each.name} was {getattr(before, each.name)!r} and is {getattr(config, each.name)!r}"
        for each in fields(config)
        if each.name not in MAY_CHANGE | MEASURED and getattr(before, each.name) != getattr(config, each.name)
    ]
    if other:
        raise UserError(f"{found.path}: cannot go on with other settings: {'; '.join(other)}")


def check_data(found: Checkpoint, store: EmbeddingStore, encoder: str) -> None:
    """Raise `UserError` where the store is not the one the run was trained on; it may have been moved."""
    before, space = found.contents["audio_space"], store.encoders[encoder]
    other = [f"{key} was {before.get(key)!r} and is {space[key]!r}" for key in space if before.get(key) != space[key]]
    if other:
        raise UserError(f"{found.path}: cannot go on in another audio space than {store.path} has: {'; '.join(other)}")
    if found.contents["progress"]["data"] != data_digest(store, encoder):
        raise UserError(
            f"{found.path}: cannot go on with other data: {store.path} has not the recordings, captions or vectors "
            f"that the run began with"
        )


def restore(
    found: Checkpoint,
    text_encoder: TextEncoder,
    projection: ProjectionHead,
    temperature: Temperature,
    optimizer: AdamW,
    schedule: LambdaLR,
) -> tuple[Progress, Best]:
    """Put weights, optimizer, schedule and random states back; returns how far the run was.

    Rates follow from the present schedule, so that another number of epochs re-plans what is left of it.
    """
    contents = found.contents
    restore_weights(found.path, contents, text_encoder, projection)
    with torch.no_grad():
        temperature.log.fill_(contents["log_temperature"])
    groups = optimizer.state_dict()["param_groups"]  # as built for this device; the settings are the same
    optimizer.load_state_dict({"state": contents["optimizer_state_dict"]["state"], "param_groups": groups})
    schedule.load_state_dict(contents["schedule_state_dict"])
    for group, base, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * factor(schedule.last_epoch)
    best = contents["best"]
    torch.set_rng_state(contents["random_state"]["cpu"])
    if projection.mean.device.type == "cuda" and "cuda" in contents["random_state"]:
        torch.cuda.set_rng_state(contents["random_state"]["cuda"], projection.mean.device)
    return Progress(**contents["progress"]), Best(tuple(best["r1"]), best["r1_epoch"], best["loss"])


def say_if_done(found: Checkpoint, config: TrainingConfig, log: Logger) -> bool:
    """Whether a run has been trained and tested to its end; the log then says so."""
    if not (is_finished(found, config) and is_measured(found, config)):
        return False
    epoch, best = found.contents["progress"]["epoch"], found.contents["best"]["r1_epoch"]
    log.info(
        f"{found.path}: this run is finished after epoch {epoch}, best epoch {best}; its test metrics are in "
        f"{Path(config.checkpoint_dir) / FILE_NAME}. More --epochs or --patience would go on with it"
    )
    return True


def curve_start(found: Checkpoint | None) -> tuple[int, dict[str, float]]:
    """From which step on the curves in the log folder are hidden, and the scalars of it that are written again.

    At an epoch's end everything up to the checkpoint's step is on disk and nothing else belongs to it. In an epoch, a
    validation may have followed at the same step, which is about to be repeated. A fresh run hides all.
    """
    if found is None:
        return 0, {}
    step = found.contents["step"]
    return (step, found.contents["points"]) if found.contents["progress"]["batches"] else (step + 1, {})


def is_finished(found: Checkpoint, config: TrainingConfig) -> bool:
    """Whether no epoch is left to train, by its number or by early stopping."""
    epoch, best = found.contents["progress"]["epoch"], found.contents["best"]["r1_epoch"]
    return epoch >= config.epochs or epoch - best >= config.patience


def is_measured(found: Checkpoint, config: TrainingConfig) -> bool:
    """Whether the summary already has the test metrics of this finished run."""
    path = Path(config.checkpoint_dir) / FILE_NAME
    entry = read_summary(path).get(config.audio_encoder, {}) if path.exists() else {}
    key = found.contents["progress"]["started"], found.contents["best"]["r1_epoch"]
    return (entry.get("started"), entry.get("epoch")) == key


def set_aside(config: TrainingConfig, log: Logger) -> None:
    """Before a fresh run: move the checkpoints of an unfinished one into a folder of their own, and say so."""
    last = checkpoint_path(config, "last")
    there = [path for path in (last, previous_path(last)) if path.exists()]
    if not there:
        return
    found, fault = _first_whole(there)
    if found is not None and is_finished(found, found.config):
        return
    number = 1
    while (folder := last.parent / f"{config.audio_encoder}_unfinished_{number}").exists():
        number += 1
    folder.mkdir()
    for which in ("best_r1", "best_loss", "last", "last.prev"):
        path = checkpoint_path(config, which)
        if path.exists():
            path.rename(folder / path.name)
    if found is None:
        log.warning(f"warning: {fault}; this is a fresh run, and what was there is now in {folder}")
        return
    command = resume_command(replace(found.config, checkpoint_dir=str(folder)))
    log.warning(
        f"warning: this is a fresh run; the checkpoints of an unfinished one (step {found.contents['step']}) are now "
        f"in {folder}; to go on with that: {command}"
    )


def _first_whole(paths: list[Path]) -> tuple[Checkpoint | None, str]:
    """The first of these checkpoints that can be read, and what is wrong with the others."""
    faults = []
    for path in paths:
        try:
            return _read(path), "; ".join(faults)
        except UserError as error:
            faults.append(str(error))
    return None, "; ".join(faults)


def resume_command(config: TrainingConfig) -> str:
    """The command line that goes on with a run: every setting that is not the default, and --resume auto."""
    defaults = TrainingConfig(config.audio_encoder)
    words = ["python", "train.py", "--audio-encoder", config.audio_encoder]
    for each in fields(config):
        value = getattr(config, each.name)
        if each.name in {"resume", *MEASURED} or value == getattr(defaults, each.name):
            continue
        words += [f"--{each.name.replace('_', '-')}", *([] if each.type is bool else [str(value)])]
    return shlex.join([*words, "--resume", "auto"])
