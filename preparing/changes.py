"""What a run would make otherwise than the finished store has it, counted, and the plan of the store that is next."""

import argparse
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from common.errors import UserError
from embedding_models.enrichment import RECIPE
from embedding_models.precision import stored_type
from embedding_models.registry import ENCODERS, model_flag
from preparing.differences import differences
from preparing.earlier_store import holding_spaces, noted_precision
from preparing.opening import open_dataset
from preparing.recordings import NO_CAPTION, Dataset, Recording
from preparing.shards import split_columns
from store.reading import SPLITS, EmbeddingStore, StoreHeader
from store.writing import store_bytes

Texts = Counter[tuple[str, str]]  # how often each (kind, text) is a recording's caption


@dataclass
class Changes:
    """Numbers of what has changed since a store was made; `settings` has a line for each setting that differs.

    Recordings by their ids; captions are counted of those that are in both. A caption that went while another came to
    the same recording is a changed one.
    """

    settings: str = ""
    new: int = 0
    gone: int = 0
    other_split: int = 0
    other_source: int = 0
    new_captions: int = 0
    gone_captions: int = 0
    changed_captions: int = 0
    kept: int = 0  # recordings that are in both, which is no change

    def __bool__(self) -> bool:
        return any(getattr(self, each.name) for each in fields(self) if each.name != "kept")

    def lines(self) -> Iterator[str]:
        """What has changed, in words: a line for the table, then one for each setting."""
        recordings = {
            "new": self.new,
            "gone": self.gone,
            "in another split": self.other_split,
            "of another source": self.other_source,
        }
        captions = {"changed": self.changed_captions, "new": self.new_captions, "gone": self.gone_captions}
        parts = [f"recordings: {_counted(recordings)}"] if any(recordings.values()) else []
        parts += [f"captions of the others: {_counted(captions)}"] if any(captions.values()) else []
        if parts:
            yield "the data set has changed; " + "; ".join(parts)
        yield from self.settings.strip().splitlines()


def _counted(numbers: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {what}" for what, number in numbers.items() if number)


def changes_since(store: EmbeddingStore, header: StoreHeader, dataset: Dataset) -> Changes:
    """Compare a finished store with what this run would make; nothing has changed where the result is false.

    The order of recordings and captions does not count, nor do recordings that the store skipped, unless they had no
    caption then and have one now.
    """
    changes = table_changes(store, dataset)
    changes.settings = settings_changed(store.header, header)
    return changes


def table_changes(store: EmbeddingStore, dataset: Dataset) -> Changes:
    """As `changes_since`, of recordings and captions alone."""
    changes, earlier = Changes(), _recordings(store)
    skipped = {audio_id for audio_id, reason in store.skipped() if reason != NO_CAPTION}
    for recording in dataset.recordings:
        if recording.audio_id in earlier:
            _compare(changes, *earlier.pop(recording.audio_id), recording)
        elif recording.audio_id not in skipped:
            changes.new += 1
    changes.gone = len(earlier)
    return changes


def check_replaceable(store: EmbeddingStore, header: StoreHeader, changes: Changes, limit: int | None) -> None:
    """Raise `UserError` where none of a store's vectors holds in the next one, or it would drop what nobody named."""
    instead = "use another --output-dir, or --overwrite"
    only_there = [name for name in store.encoders if name not in header.encoders]
    if only_there:
        named = " and ".join(only_there)
        raise UserError(
            f"{store.path}: also holds {named}, which this run would drop; name all in --encoders, {instead}"
        )
    if not holding_spaces(store.header, header):
        lines = "".join(f"\n  {line}" for line in changes.lines())
        raise UserError(f"{store.path}: none of its vectors holds for this run; {instead}:{lines}")
    if limit and changes.gone:
        raise UserError(
            f"{store.path}: this run, with --limit {limit}, would drop {changes.gone:,} of its "
            f"{changes.kept + changes.gone:,} recordings; {instead}"
        )


def settings_changed(then: StoreHeader, now: StoreHeader) -> str:
    """Lines like those of `differences`, for what decides over a store's vectors and split."""
    made, asked = ({name: getattr(each, name) for name in ("encoders", "dtype", "seed")} for each in (then, now))
    known = [name for name in now.weights if name in then.weights]
    made["weights"], asked["weights"] = ({name: each.weights[name] for name in known} for each in (then, now))
    if then.dataset == now.dataset and None not in (then.revision, now.revision):
        made["revision of the data set"], asked["revision of the data set"] = then.revision, now.revision
    return differences(made, asked)


def _recordings(store: EmbeddingStore) -> dict[str, tuple[str, str, Texts]]:
    """Split, source id and captions by audio id."""
    found: dict[str, tuple[str, str, Texts]] = {}
    for name in SPLITS:
        split = store.split(name)
        texts: list[Texts] = [Counter() for _ in split.audio_id]
        for row, kind, text in zip(split.caption_audio.tolist(), split.caption_kind, split.caption, strict=True):
            texts[row][kind, text] += 1
        found |= {
            audio_id: (name, source, captions)
            for audio_id, source, captions in zip(split.audio_id, split.source_id, texts, strict=True)
        }
    return found


def _compare(changes: Changes, split: str, source_id: str, then: Texts, recording: Recording) -> None:
    now = Counter((caption.kind, caption.text) for caption in recording.captions)
    came, went = (now - then).total(), (then - now).total()
    changed = min(came, went)
    changes.kept += 1
    changes.other_split += split != recording.split
    changes.other_source += source_id != recording.source_id
    changes.changed_captions += changed
    changes.new_captions += came - changed
    changes.gone_captions += went - changed


def next_store_lines(args: argparse.Namespace) -> Iterator[str]:
    """What becomes of the store in --output-dir; nothing where there is none.

    No audio is read and no encoder loaded: recordings are told by their ids, encoders by name. For MusicBench on the
    hub, of which the plan fetches nothing, the table counts as unchanged. Raises `UserError` as the run would.
    """
    path = Path(args.output_dir) / "embeddings.h5"
    if args.overwrite or not path.exists():
        return
    store = EmbeddingStore(path)
    splits, changes = {name: store.split(name) for name in SPLITS}, Changes()
    if args.dataset:
        dataset = open_dataset(args.dataset, None, args.val_fraction, args.seed, args.limit)
        splits, changes = split_columns(dataset, 0, 1), table_changes(store, dataset)
    header = _foreseen(args, store)
    holding, then = holding_spaces(store.header, header), store.header
    asked = list(header.encoders)
    is_same = (then.seed, then.dtype, holding, holding) == (args.seed, header.dtype, [*then.encoders], asked)
    if is_same and not changes:
        yield f"store       {path} is what this run makes: nothing is computed"
        return
    check_replaceable(store, header, changes, args.limit)
    there = {audio_id for name in SPLITS for audio_id in store.split(name).audio_id}
    recordings = [audio_id for split in splits.values() for audio_id in split.audio_id]
    kept = sum(audio_id in there for audio_id in recordings)
    yield f"store       {path} is there; a new one is made beside it and then takes its place"
    for line in changes.lines():
        yield f"            {line}"
    yield from _shares({name: kept if name in holding else 0 for name in header.encoders}, len(recordings))
    new, old = (f"{size / 1e9:.3f} GB" for size in (store_bytes(header, splits), path.stat().st_size))
    free = f"{shutil.disk_usage(path.parent).free / 1e9:.1f} GB"
    yield f"            the new one takes {new} beside the {old} of the old one; {free} are free. As much again while"
    yield "            shards are merged, or where recordings were skipped and the rest is copied"


def _foreseen(args: argparse.Namespace, store: EmbeddingStore) -> StoreHeader:
    """The header of the run's store as far as it is known before encoders are loaded."""
    entries = {}
    for encoder in ENCODERS.values():
        if encoder.name in args.encoders:
            known = store.encoders.get(encoder.name, {"dim": encoder.dim})
            entries[encoder.name] = {
                "id": model_flag(args, encoder) or encoder.weights.id,
                "dim": known["dim"],
                "recipe": RECIPE,
                **noted_precision(args.dtype),
            }
    header = store.header
    return StoreHeader(header.dataset, header.revision, args.seed, stored_type(args.dtype), entries)


def _shares(taken: dict[str, int], recordings: int) -> Iterator[str]:
    computed = Counter({name: recordings - count for name, count in taken.items()})
    for what, counts in (("taken", taken), ("computed", computed)):
        listed = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
        yield f"            vectors {what}: {listed or 'none'}"
    cost = {name: ENCODERS[name].tflop for name in taken}
    share = sum(cost[name] * computed[name] for name in cost) / (recordings * sum(cost.values()))
    yield f"            that is {100 * share:.2g} % of the encoders' work; files are told by their ids here, and read"
    yield "            in the run, where one that has changed is computed again"
