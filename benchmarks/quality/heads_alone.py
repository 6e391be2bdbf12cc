"""Spaces compared by heads alone on frozen text vectors: seconds a run, so that many settings can be tried.

For each setting and seed a head is trained on the store's captions, and found are its recordings' captions (R@10, MRR
of the test split) and, with --transfer, music of another kind (benchmarks/quality/transfer.py). What is best here is
confirmed by full runs (benchmarks/quality/ablation.py). A setting is written as mode:mean:floor:temperature, such as
zscore:1:0.3:0.07, with :blocks of the recipe where not all three are taken (1: mean; 2: mean and spread).
"""

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, this folder is the path
from benchmarks.quality.ablation import text_model
from benchmarks.quality.training_runs import append_result, markdown, read_results, spread
from benchmarks.quality.transfer import Words, embed, read_words, store_vectors, transfer_metrics
from common.errors import UserError, run_script
from store.reading import EmbeddingStore
from text_to_audio.config import TrainingConfig
from text_to_audio.loading.batches import plan_epoch
from text_to_audio.loading.captions import CaptionSet
from text_to_audio.loss.info_nce import audio_to_text_loss, contrastive_loss
from text_to_audio.measuring.evaluation import make_gallery
from text_to_audio.measuring.metrics import retrieval_metrics
from text_to_audio.model.head import ProjectionHead
from text_to_audio.model.text_encoder import TextEncoder
from text_to_audio.training.optimisation import build_schedule
from text_to_audio.training.spaces import spread_of

BATCH, RATE, HIDDEN, WEIGHT_DECAY = 64, 1e-3, 1024, 0.1
BLOCKS = 3  # of the recipe: mean, spread, change


@dataclass(frozen=True)
class Setting:
    """A point of the family of spaces, and how many of the recipe's blocks are taken."""

    mode: str
    mean_removed: float
    std_floor: float
    temperature: float
    blocks: int = BLOCKS

    @classmethod
    def parse(cls, text: str) -> "Setting":
        """mode:mean:floor:temperature[:blocks]; `UserError` for anything else."""
        mode, *numbers = text.split(":")
        try:
            mean, floor, temperature, *blocks = map(float, numbers)
        except ValueError as error:
            raise UserError(f"expected mode:mean:floor:temperature, such as zscore:1:1:0.07, found {text!r}") from error
        return cls(mode, mean, floor, temperature, *map(int, blocks))


class FrozenSet:
    """A store's vectors and statistics, cut to some blocks, and the frozen text encoder's vectors of its captions."""

    def __init__(self, store: EmbeddingStore, encoder: str, texts: TextEncoder):
        self.store, self.encoder = store, encoder
        self.vectors = partial(store_vectors, store, encoder)
        self.train = CaptionSet.of(store.split("train"))
        self.gallery = make_gallery(store.split("test"), one_per_source=False)
        self.words: Words = read_words(store)
        self.text, self.test_text, self.word_text = (
            embed(texts, each) for each in (self.train.captions, self.gallery.captions.captions, list(self.words))
        )

    def keep_pairs(self, count: int) -> None:
        """Learn from so many of the captions, the same at every call; of a larger count they are part."""
        kept = np.random.default_rng(0).permutation(len(self.train.captions))[:count]
        texts = [self.train.captions[i] for i in kept]
        self.train = CaptionSet(texts, self.train.caption_audio[kept], self.train.caption_source[kept])
        self.text = self.text[kept]

    def head(self, setting: Setting, seed: int) -> ProjectionHead:
        """A head into the setting's space, with weights of this seed."""
        torch.manual_seed(seed)
        width = self.store.dim(self.encoder) * setting.blocks // BLOCKS
        mean, std = (values[:width] for values in self.store.statistics(self.encoder))
        head = ProjectionHead(self.text.shape[1], HIDDEN, width)
        head.set_statistics(mean, std, setting.mode, setting.mean_removed, setting.std_floor)
        return head


def train_head(data: FrozenSet, setting: Setting, seed: int, epochs: int) -> tuple[ProjectionHead, float]:
    """A trained head, in evaluation mode, and the spread of its space."""
    head = data.head(setting, seed)
    audio = head.standardise_audio(data.vectors("train", head.audio_dim))
    own = spread_of(audio, torch.zeros(head.audio_dim))
    temperature = setting.temperature * own
    matrices = [each for each in head.parameters() if each.dim() > 1]
    others = [each for each in head.parameters() if each.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    plans = [plan_epoch(data.train.caption_source, BATCH, seed, epoch) for epoch in range(1, epochs + 1)]
    steps = sum(map(len, plans))
    schedule = build_schedule(optimizer, steps // 10, steps)
    for batch in (np.asarray(batch) for plan in plans for batch in plan):
        similarity = head.project_text(data.text[batch]) @ audio[data.train.caption_audio[batch]].T
        target = torch.arange(len(batch))
        loss = contrastive_loss(similarity, target, temperature) + audio_to_text_loss(similarity, target, temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head.eval(), own


@torch.no_grad()
def measure(data: FrozenSet, other: FrozenSet | None, head: ProjectionHead) -> dict[str, float]:
    """R@10 and MRR of the test split's captions, and the metrics of the other store's music."""
    audio = head.standardise_audio(data.vectors("test", head.audio_dim)[data.gallery.rows])
    scores = head.project_text(data.test_text) @ audio.T
    found = retrieval_metrics(scores, torch.from_numpy(data.gallery.captions.caption_audio))
    values = {"R@10": found["t2a_R@10"], "MRR": found["t2a_MRR"]}
    if other:
        values |= transfer_metrics(other.vectors, other.gallery, head, other.words, other.word_text, other.test_text)
    return values


def table(results: list[dict]) -> str:
    """A line per setting, mean and standard deviation over the seeds."""
    names = [name for name in results[0] if name not in ("setting", "seed", "spread")] if results else []
    rows = []
    for setting in dict.fromkeys(each["setting"] for each in results):
        found = [each for each in results if each["setting"] == setting]
        cells = [spread([each[name] for each in found], 1 if name == "R@10" else 3) for name in names]
        rows.append([setting, f"{found[0]['spread']:.2f}", *cells, str(len(found))])
    return markdown(["setting", "spread", *names, "runs"], rows)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python -m benchmarks.quality.heads_alone demo/data/musicbench_embeddings/embeddings.h5 \\\n"
        "             zscore:1:0:0.07 zscore:1:1:0.07 none:0:0:0.03 --transfer other/embeddings.h5",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("store", help="store to train on")
    add("settings", nargs="+", metavar="SETTING", help="mode:mean:floor:temperature[:blocks]")
    add("--transfer", metavar="STORE", help="store of music of another kind, with the same audio space")
    add("--audio-encoder", default="musicnn", metavar="NAME", help="audio space (default: %(default)s)")
    add("--epochs", type=int, default=12, help="epochs of a run (default: %(default)s)")
    add("--pairs", type=int, metavar="INT", help="captions to learn from, in as many steps (default: all)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="INT", help="seeds (default: 0 to 4)")
    add("--results", type=Path, default=Path("heads_alone.jsonl"), help="lines of results (default: %(default)s)")
    add("--text-model", metavar="STR", help="text encoder (default: MiniLM's real weights)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, print the table of these settings."""
    args = build_parser().parse_args(argv)
    settings = {text: Setting.parse(text) for text in args.settings}
    config = TrainingConfig(args.audio_encoder, text_model=args.text_model or text_model(), device="cpu")
    encoder = TextEncoder(config).eval()
    data = FrozenSet(EmbeddingStore(args.store), args.audio_encoder, encoder)
    other = FrozenSet(EmbeddingStore(args.transfer), args.audio_encoder, encoder) if args.transfer else None
    epochs = args.epochs
    if args.pairs:
        epochs = epochs * len(data.train.captions) // args.pairs
        data.keep_pairs(args.pairs)
    finished = {(each["seed"], each["setting"]) for each in read_results(args.results)}
    todo = [(seed, text) for seed in args.seeds for text in settings if (seed, text) not in finished]
    for seed, text in tqdm(todo, "heads", unit="run"):
        head, own = train_head(data, settings[text], seed, epochs)
        result = {"setting": text, "seed": seed, "spread": own, **measure(data, other, head)}
        append_result(args.results, result)
    print(table([each for each in read_results(args.results) if each["setting"] in settings]))


if __name__ == "__main__":
    run_script(main)
