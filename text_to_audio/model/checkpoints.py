"""Checkpoints: what is in them, written such that a kill or a full disk leaves the old one."""

import os
from pathlib import Path

import torch

from common.errors import UserError
from common.files import replacing
from text_to_audio.config import TrainingConfig
from text_to_audio.model.head import ProjectionHead
from text_to_audio.model.text_encoder import TextEncoder

MODEL = {"config", "text_encoder_state_dict", "projection_state_dict"}


def make_folder(folder: Path) -> None:
    """Make a folder where it is missing; `UserError` where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: expected a folder to write to ({error.strerror})") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: expected a folder to write to (no permission)")


def checkpoint_path(config: TrainingConfig, which: str) -> Path:
    """Path of a run's checkpoint: `which` is "best_r1", "best_loss" or "last"."""
    return Path(config.checkpoint_dir) / f"{config.run_name}_{which}.pt"


def model_state(config: TrainingConfig, text_encoder: TextEncoder, projection: ProjectionHead) -> dict:
    """What it takes to use the model: config, the LoRA weights alone, the head. Plain types, tensors on the CPU."""
    return {
        "config": config.as_dict(),
        "text_encoder_state_dict": text_encoder.trained_state(),
        "projection_state_dict": head_state(projection),
    }


def head_state(projection: ProjectionHead) -> dict[str, torch.Tensor]:
    """The head's weights and statistics, on the CPU."""
    return {name: value.detach().cpu() for name, value in projection.state_dict().items()}


def save_checkpoint(path: Path, contents: dict, previous: Path | None = None) -> None:
    """Write beside `path`, flush to disk and rename. `UserError` where it cannot be written; the old file stays.

    The file that was there is kept as `previous` where that is given. A kill between the two renames leaves
    `previous` alone.
    """
    try:
        with replacing(path, previous) as beside, open(beside, "wb") as file:
            torch.save(contents, file)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a failed write into a RuntimeError
        kept = "; the one before it is still there" if path.exists() else ""
        raise UserError(f"{path}: could not write the checkpoint ({_reason(error)}){kept}") from error


def _reason(error: Exception) -> str:
    cause = error if isinstance(error, OSError) else error.__context__
    return cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error).splitlines()[0]


def read_checkpoint(path: str | Path, needed: set[str] = MODEL, mapped: bool = False) -> dict:
    """The contents of a checkpoint, on the CPU; `UserError` where it is missing, cut off or something else.

    needed: what must be in it, by default what it takes to use the model. mapped: its tensors stay in the file, for who
    wants to know whose it is and has no use for hundreds of megabytes.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a checkpoint written by train.py")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a cut or foreign file fails in as many ways as it can be broken
        raise UserError(
            f"{path}: expected a checkpoint written by train.py, found a file that torch cannot load "
            f"({(str(error).splitlines() or [type(error).__name__])[0]})"
        ) from error
    if isinstance(contents, dict) and "spaces" in contents and needed - contents.keys() == {"projection_state_dict"}:
        names = ", ".join(f"{name}_best_r1.pt" for name in contents["spaces"])
        raise UserError(
            f"{path}: expected the checkpoint of one audio space, such as {names}; a joint run goes on from it"
        )
    if not isinstance(contents, dict) or not needed <= contents.keys():
        raise UserError(f"{path}: expected a checkpoint with {', '.join(sorted(needed))}, found another file")
    return contents


def restore_weights(path: Path, contents: dict, text_encoder: TextEncoder, projection: ProjectionHead) -> None:
    """Load a checkpoint's weights into models; `UserError` where they do not fit."""
    try:
        text_encoder.model.load_state_dict(contents["text_encoder_state_dict"])
        projection.load_state_dict(contents["projection_state_dict"])
    except RuntimeError as error:
        shown = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: its weights do not fit the model its config names: {shown}") from error
