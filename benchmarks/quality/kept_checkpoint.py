"""Which epoch's checkpoint is worth keeping: rules x sizes of the validation part, by what they reach in the test.

A run is trained to its last epoch once; every epoch's validation scores and test metrics are noted (kept in --work).
All that a rule sees of a validation follows from its scores, so that each rule is then tried on the validation cut to
so many recordings, drawn several times, without training again. "stops" is a run that waits --patience epochs for
another epoch to be kept; the learning rate falls as in the whole run. By default only the head is trained, on the text
vectors of the model as it is; --lora trains the text model too, as train.py does.
"""

import argparse
import sys
from collections import defaultdict
from dataclasses import dataclass, fields
from logging import getLogger
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, this folder is the path
import train
from benchmarks.quality.ablation import text_model
from benchmarks.quality.kept_rules import RULES, Curve, highest_r1, stopped_at
from benchmarks.quality.training_runs import markdown, spread
from common.errors import run_script
from text_to_audio.config import TrainingConfig
from text_to_audio.loading.step_data import StepData
from text_to_audio.loading.tokens import TokenCache
from text_to_audio.loading.vectors import AudioVectors
from text_to_audio.measuring.evaluation import caption_scores, embed_captions, make_gallery
from text_to_audio.measuring.metrics import retrieval_metrics
from text_to_audio.planning.choosing import choose
from text_to_audio.training.training_run import Run, prepare

TEST_METRICS = ("t2a_R@10", "t2a_MRR")


@dataclass(kw_only=True)
class HeadsAlone(Run):
    """A run on frozen text.

    frozen: split -> (captions, text_dim) sentence embeddings, which all runs have in common.
    """

    frozen: dict[str, Tensor]

    @classmethod
    def of(cls, run: Run, frozen: dict[str, Tensor]) -> "HeadsAlone":
        """The same run; its own captions' embeddings are made where `frozen` has none yet."""
        run.text_encoder.eval()
        if "train" not in frozen:
            frozen["train"] = embed_captions(run.text_encoder, run.tokens).to(run.config.torch_device)
        return cls(**{each.name: getattr(run, each.name) for each in fields(Run)}, frozen=frozen)

    def embed(self, data: StepData, number: int) -> Tensor:
        """Sentence embeddings of a micro-batch's captions."""
        return self.frozen["train"][data.captions[data.parts[number]]]


class Part:
    """A split as it is measured here: all its recordings, or one per source, are in the gallery."""

    def __init__(self, run: Run, name: str, one_per_source: bool):
        self._name, self.gallery = name, make_gallery(run.store.split(name), one_per_source)
        self.audio = torch.from_numpy(self.gallery.captions.caption_audio)
        self._tokens = TokenCache(run.text_encoder, self.gallery.captions.captions)
        self._vectors = AudioVectors(run.store, name, run.config.audio_encoder)

    def scores(self, run: Run) -> Tensor:
        """Cosines (captions, recordings) by the models as they are now."""
        frozen = run.frozen if isinstance(run, HeadsAlone) else dict[str, Tensor]()
        text = frozen.get(self._name)
        if text is None:
            text = frozen[self._name] = embed_captions(run.text_encoder, self._tokens)
        return caption_scores(text, run.spaces[0].projection, self._vectors, self.gallery.rows)


def record(config: TrainingConfig, frozen: dict[str, Tensor] | None, one_per_source: bool) -> dict:
    """Train through all epochs, without early stopping or checkpoints: the head alone where `frozen` is not None.

    Returns "scores" of the validation, (epochs, captions, recordings), "audio", (captions,) their recordings, "test",
    (epochs, TEST_METRICS), and the space's "temperature".
    """
    choose(config, train.train_step)
    run = prepare(config, getLogger("kept_checkpoint"))
    if frozen is not None:
        run = HeadsAlone.of(run, frozen)
    validation, test = Part(run, "val", one_per_source), Part(run, "test", one_per_source=False)
    scores, found = [], []
    for epoch in range(1, config.epochs + 1):
        for module in run.modules():
            module.train()
        train.train_epoch(run, epoch)
        run.progress = run.progress.after_epoch(epoch)
        for module in run.modules():
            module.eval()
        scores.append(validation.scores(run))
        metrics = retrieval_metrics(test.scores(run), test.audio)
        found.append([metrics[name] for name in TEST_METRICS])
    return {
        "scores": torch.stack(scores),
        "audio": validation.audio,
        "test": torch.tensor(found),
        "temperature": run.spaces[0].temperature().item(),
    }


def recorded(path: Path, config: TrainingConfig, frozen: dict[str, Tensor] | None, one_per_source: bool) -> dict:
    """`record`, from the file where it was made before."""
    if not path.exists():
        found = record(config, frozen, one_per_source)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, path)
    return torch.load(path, weights_only=True)


def tried(run: dict, seed: int, size: int, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Rule -> (draws, 8): to the end and stopped, R@10 and MRR of its epoch less those of the last and the old rule's.

    size: recordings of the validation, 0 for all, of which there is one draw. The old rule stops by itself.
    """
    test, rows = run["test"].numpy(), defaultdict(list)
    every = run["scores"].shape[2]
    for draw in range(args.draws if 0 < size < every else 1):
        chosen = np.sort(np.random.default_rng((seed, draw)).permutation(every)[: size or every])
        curve = Curve.of(run["scores"], run["audio"], torch.from_numpy(chosen), run["temperature"])
        old = [curve, curve.until(stopped_at(curve, highest_r1, args.patience))]
        for name, rule in RULES.items():
            own = [curve, curve.until(stopped_at(curve, rule, args.patience))]
            pairs = [(test[rule(mine)], test[highest_r1(other)]) for mine, other in zip(own, old, strict=True)]
            rows[name].append(np.concatenate([part for x, y in pairs for part in (x - test[-1], x - y)]))
    return {name: np.stack(each) for name, each in rows.items()}


def table(runs: dict[int, dict], size: int, args: argparse.Namespace) -> str:
    """A line per rule: mean and standard deviation over all runs and draws, and the worst."""
    found = [tried(run, seed, size, args) for seed, run in runs.items()]
    rows = []
    for name in RULES:
        values = np.concatenate([each[name] for each in found])
        cells = [spread(values[:, column].tolist(), 3 if column % 2 else 2, "+") for column in range(8)]
        rows.append([name, cells[0], f"{values[:, 0].min():+.1f}", *cells[1:]])
    header = ["kept", "R@10 - last's", "worst", "MRR - last's", "R@10 - old rule's", "MRR - old rule's"]
    return markdown([*header, *(f"stops: {each}" for each in (header[1], *header[3:]))], rows)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: nice python -m benchmarks.quality.kept_checkpoint --data-path embeddings.h5 "
        "--audio-encoder musicnn --sizes 20 54 0",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data-path", required=True, metavar="FILE", help="a store")
    add("--audio-encoder", default="musicnn", metavar="NAME", help="audio space (default: %(default)s)")
    add("--text-model", metavar="STR", help="text encoder (default: MiniLM's real weights)")
    add("--work", type=Path, default=Path("kept-checkpoint"), help="folder of the records (default: %(default)s)")
    add("--lora", action="store_true", help="train the text model too")
    add("--epochs", type=int, default=12, help="epochs of a run (default: %(default)s)")
    add("--lr", type=float, default=1e-3, help="learning rate of the head (default: %(default)s)")
    add("--temperature", type=float, default=0.07, help="as train.py's (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=list(range(8)), metavar="INT", help="runs (default: 0 to 7)")
    add("--sizes", type=int, nargs="+", default=[20, 54, 0], metavar="INT", help="recordings; 0: all (20 54 0)")
    add("--draws", type=int, default=8, help="draws of a size in each run (default: %(default)s)")
    add("--patience", type=int, default=5, help="epochs a run waits (default: %(default)s)")
    add("--all-recordings", action="store_true", help="validate on every recording, not on one per source")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Train what is not recorded yet, and print a table for every size."""
    args = build_parser().parse_args(argv)
    store, model = Path(args.data_path).resolve(), args.text_model or text_model()
    kind = f"{'lora' if args.lora else 'heads'}_{args.epochs}_{args.lr:g}_{args.temperature:g}"
    texts = args.work / f"{store.parent.name}_texts.pt"
    known: dict[str, Tensor] = torch.load(texts, weights_only=True) if texts.exists() else {}
    runs, frozen = {}, None if args.lora else known
    for seed in tqdm(args.seeds, "runs", unit="run"):
        config = TrainingConfig(
            args.audio_encoder, data_path=str(store), text_model=model, epochs=args.epochs, batch_size=16,
            gradient_accumulation_steps=4, lr=args.lr, text_lr=5e-4 if args.lora else 0.0, max_length=64,
            temperature=args.temperature, seed=seed, patience=args.epochs,
        )  # fmt: skip
        path = args.work / f"{store.parent.name}_{args.audio_encoder}_{kind}_{seed}.pt"
        runs[seed] = recorded(path, config, frozen, not args.all_recordings)
        if frozen and not texts.exists():
            torch.save(frozen, texts)
    for size in args.sizes:
        last = np.stack([run["test"][-1].numpy() for run in runs.values()])
        print(
            f"\nvalidation of {size or 'all'} recordings, {len(runs)} runs of {args.epochs} epochs; last epoch R@10 ",
            end="",
        )
        print(f"{spread(last[:, 0].tolist(), 1)}, MRR {spread(last[:, 1].tolist(), 3)}")
        print(table(runs, size, args))


if __name__ == "__main__":
    run_script(main)
