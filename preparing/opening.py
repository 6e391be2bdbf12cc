"""Any data set that `--dataset` can mean: MusicBench on the hub or in a folder, or a table of one's own recordings."""

from pathlib import Path

from common import hub
from common.errors import UserError
from preparing.clips import ClipSource, HubTarClips, folder_or_tar
from preparing.musicbench import METADATA, REPO_ID, REVISION, TAR, metadata_in, rows_of
from preparing.own_recordings import read_own_recordings
from preparing.recordings import Dataset, Recording, build_recordings
from store.reading import SPLITS


def open_dataset(
    dataset: str | None = None,
    revision: str | None = None,
    val_fraction: float = 0.1,
    seed: int = 42,
    limit: int | None = None,
) -> Dataset:
    """Read the metadata of MusicBench or of one's own recordings, and say where the audio is.

    `dataset`: None for MusicBench on the hub (at `revision`, by default the pinned one), a folder with MusicBench's
    files, or a table of one's own recordings (own_recordings.py). Of the hub's files only the metadata are fetched
    here; the tar follows with `clips.prepare()`. Raises `UserError` where something is missing or malformed, and,
    unless `val_fraction` is 0, where a split would have no recording: train.py needs all three.
    """
    if dataset is None:
        # One commit for all files, whatever happens to a branch meanwhile. The pinned one needs no look-up.
        commit = hub.resolved_revision(REPO_ID, revision or REVISION, repo_type="dataset")
        files = [hub.fetch_file(REPO_ID, name, revision=commit, repo_type="dataset") for name in METADATA]
        clips: ClipSource = HubTarClips(REPO_ID, TAR, commit)
        recordings, dropped = build_recordings(rows_of(files), val_fraction, seed, limit)
        return Dataset(REPO_ID, commit, recordings, dropped, clips)
    path = Path(dataset).expanduser()
    if revision is not None:
        raise UserError(f"--revision is for MusicBench on the hub; it says nothing about the local {path}")
    if path.is_dir():
        recordings, dropped = build_recordings(rows_of(metadata_in(path)), val_fraction, seed, limit)
        clips = folder_or_tar(path, [recording.audio_id for recording in recordings])
    elif path.is_file():
        rows, clips = read_own_recordings(path)
        recordings, dropped = build_recordings(rows, val_fraction, seed, limit)
    else:
        raise UserError(f"--dataset {path}: expected a folder with {', '.join(METADATA)}, or a table; found neither")
    _require_splits(path, recordings, dropped, val_fraction)
    return Dataset(path.resolve().name, None, recordings, dropped, clips)


def _require_splits(
    path: Path, recordings: list[Recording], dropped: dict[str, list[str]], val_fraction: float
) -> None:
    found = {split: sum(recording.split == split for recording in recordings) for split in SPLITS}
    lost = "; ".join(f"{len(ids)} dropped: {reason}" for reason, ids in dropped.items() if ids) or "nothing was dropped"
    if not found["train"]:
        raise UserError(f"--dataset {path}: no recording is left to train on ({lost})")
    empty = [split for split in SPLITS if not found[split]]
    if empty and val_fraction:
        sources = len({recording.source_id for recording in recordings})
        raise UserError(
            f"--dataset {path}: expected recordings in train, val and test, which train.py needs; found none in "
            f"{' and '.join(empty)} ({len(recordings)} recordings of {sources} source{'s' * (sources != 1)}; {lost}). "
            f"Give more sources or a split column with all three, or say --val-fraction 0"
        )
