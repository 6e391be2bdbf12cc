"""What prepare_dataset.py says of a data set before it is embedded, and of a store once it is finished."""

from collections import Counter
from logging import Logger
from pathlib import Path

from embedding_models.pipeline import StageSeconds
from preparing.recordings import Dataset
from store.reading import SPLITS, EmbeddingStore


def log_dataset(dataset: Dataset, log: Logger) -> None:
    """Say what was found in the metadata."""
    counts = Counter(recording.split for recording in dataset.recordings)
    log.info("%s: %s recordings", dataset.name, " + ".join(f"{counts[name]:,} {name}" for name in SPLITS))
    for reason, audio_ids in dataset.dropped.items():
        if audio_ids:
            log.info("left out, %s: %s recordings", reason, f"{len(audio_ids):,}")


def log_store(path: Path, stages: StageSeconds, total: float, log: Logger) -> None:
    """Rows per split, what was skipped and why, sizes, and where the time went; `total` is the run's, in seconds."""
    store = EmbeddingStore(path)
    log.info("%-8s %12s %12s %12s", "split", "recordings", "sources", "captions")
    for name in SPLITS:
        split = store.split(name)
        counts = len(split.audio_id), len(set(split.source_id)), len(split.caption)
        log.info("%-8s %12s %12s %12s", name, *(f"{count:,}" for count in counts))
    reasons = sorted(Counter(reason for _, reason in store.skipped()).items())
    log.info("skipped  %s", ", ".join(f"{reason}: {count:,}" for reason, count in reasons) or "none")
    widths = ", ".join(f"{name} {entry['dim']:,}" for name, entry in store.encoders.items())
    log.info("file     %s, %s MB, %s: %s", path, f"{path.stat().st_size / 1e6:,.1f}", store.header.dtype, widths)
    seconds = {"decode (all workers)": stages.decode, "waiting for audio": stages.wait, **stages.encode}
    seconds |= {"writing": stages.write, "total": total}
    log.info("seconds  %s", ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items()))
