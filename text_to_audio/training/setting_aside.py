"""Before a fresh run: what earlier runs left and it would write over is moved aside, and the log says where."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from logging import Logger
from pathlib import Path

from common.errors import UserError
from text_to_audio.config import TrainingConfig
from text_to_audio.measuring.summary import FILE_NAME, read_summary, rename_earlier, update_summary
from text_to_audio.model.checkpoints import read_checkpoint
from text_to_audio.training.resuming import Checkpoint, first_whole, is_finished, previous_path, resume_command

FILES = ("best_r1.pt", "best_loss.pt", "last.pt", "last.prev.pt", "report.html")  # of each audio space


@dataclass(frozen=True)
class Earlier:
    """A run that a fresh one would write over.

    title: what its folder is called after; names: of its files that are moved; log_dir: its TensorBoard folder, if it
    says so; fault: what is wrong with a checkpoint that cannot be read.
    """

    title: str
    names: list[str]
    log_dir: str | None = None
    unfinished: Checkpoint | None = None
    fault: str = ""

    @property
    def state(self) -> str:
        """The word in its folder's name."""
        return "unfinished" if self.unfinished or self.fault else "finished"


def set_aside(config: TrainingConfig, log: Logger) -> None:
    """Move the checkpoints, curves and summary entries that a fresh run would write over; a line for each run says so.

    An unfinished run's files stay together, so that it can be gone on with. `UserError` where they cannot be moved.
    """
    folder, logs = Path(config.checkpoint_dir), Path(config.log_dir)
    try:
        renamed = rename_earlier(folder, config.audio_encoders)
        for title in dict.fromkeys(["joint", config.run_name, *config.audio_encoders]):
            earlier = _find(folder, title, config)
            if earlier:
                _move(earlier, config, renamed, log)
        for name in config.audio_encoders:  # of runs with another checkpoint folder
            if _has_files(logs / name):
                aside = _free(f"{name}_earlier", logs)
                _move_all([logs / name], logs / aside)
                log.info(f"the curves of another run in {logs / name} are now in {logs / aside}")
    except OSError as error:
        raise UserError(f"{error.filename}: could not be moved out of a fresh run's way ({error.strerror})") from error


def _find(folder: Path, title: str, config: TrainingConfig) -> Earlier | None:
    """What is called `title`, if the fresh run would write over any of it."""
    overwritten = {config.run_name, *config.audio_encoders}
    last = folder / f"{title}_last.pt"
    if not _files(folder, [title]):
        return None
    whole = [path for path in (last, previous_path(last)) if path.exists()]
    found, fault = first_whole(whole, mapped=True)
    if found and not is_finished(found, found.config):
        names = list(dict.fromkeys([title, *found.config.audio_encoders]))
        return Earlier(title, names, found.config.log_dir, found) if overwritten & set(names) else None
    if found:
        started = found.contents["progress"]["started"]
        spaces = [name for name in found.config.audio_encoders if _read(folder, name).get("started") == started]
        names = [name for name in dict.fromkeys([title, *spaces]) if name in overwritten]
        return Earlier(title, names, found.config.log_dir) if names else None
    if title not in overwritten:
        return None
    if whole and not _is_for_use(last):
        return Earlier(title, list(dict.fromkeys([title, *config.audio_encoders])), fault=fault)
    return Earlier(title, [title], _read(folder, title).get("config", {}).get("log_dir"))


def _move(earlier: Earlier, config: TrainingConfig, renamed: dict[str, str], log: Logger) -> None:
    """Move a run's files, and say so."""
    folder, logs = Path(config.checkpoint_dir), Path(config.log_dir)
    name = _free(f"{earlier.title}_{earlier.state}", folder, logs)
    _move_all(_files(folder, earlier.names), folder / name)
    own_logs = earlier.log_dir is not None and Path(earlier.log_dir).resolve() == logs.resolve()
    curves = [logs / each for each in earlier.names if _has_files(logs / each)] if own_logs else []
    if curves:
        _move_all(curves, logs / name)
    entries = _copy_entries(folder, folder / name, {each: renamed[each] for each in earlier.names if each in renamed})
    if earlier.unfinished:
        there = replace(earlier.unfinished.config, checkpoint_dir=str(folder / name))
        command = resume_command(replace(there, log_dir=str(logs / name)) if own_logs else there)
        log.warning(
            f"warning: this is a fresh run; the checkpoints of an unfinished one "
            f"(step {earlier.unfinished.contents['step']}) are now in {folder / name}; to go on with that: {command}"
        )
    elif earlier.fault:
        log.warning(f"warning: {earlier.fault}; this is a fresh run, and what was there is now in {folder / name}")
    else:
        more = f", its curves in {logs / name}" if curves else ""
        more += f", its test metrics in {folder / FILE_NAME} under {', '.join(entries)}" if entries else ""
        log.info(f"this is a fresh run; what a finished one left is now in {folder / name}{more}")


def _copy_entries(folder: Path, aside: Path, renamed: dict[str, str]) -> list[str]:
    """Give the moved checkpoints a summary of their own; returns what their entries are now called in the folder's."""
    summary, own = read_summary(folder / FILE_NAME) if renamed else {}, []
    for name, new in renamed.items():
        if summary[new].get("started") == _read(aside, name).get("started"):
            update_summary(aside, name, summary[new])
            own.append(f'"{new}"')
    return own


def _read(folder: Path, name: str) -> dict:
    """The best checkpoint called `name`, its weights left in the file; empty where there is none that can be read."""
    try:
        return read_checkpoint(folder / f"{name}_best_r1.pt", mapped=True)
    except UserError:
        return {}


def _is_for_use(path: Path) -> bool:
    """Whether this is a whole checkpoint that nothing goes on from: a joint run's of one space."""
    try:
        return bool(read_checkpoint(path, mapped=True))
    except UserError:
        return False


def _files(folder: Path, names: Iterable[str]) -> list[Path]:
    paths = [folder / f"{name}_{file}" for name in names for file in FILES]
    return [path for path in paths if path.exists()]


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _free(stem: str, *folders: Path) -> str:
    """The first of {stem}_1, {stem}_2, ... that none of the folders has."""
    number = 1
    while any((folder / f"{stem}_{number}").exists() for folder in folders):
        number += 1
    return f"{stem}_{number}"


def _move_all(paths: Iterable[Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    for path in paths:
        path.rename(folder / path.name)
