"""Whether negatives pay at scale: train.py on 50,000 synthetic recordings, settings of both directions and the masks.

A source is a draw of one value for each of many attributes. Its recordings are near-duplicates, as MusicBench's copies
are: an audio vector is a fixed random two-layer network of the source's attributes and a little of the copy's own, plus
noise. A caption names some of the attributes, in one of two words each, among words that say nothing. Text and audio
can thus be matched, though no caption says all; the gallery is of sources that were not trained on. The text model is a
small BERT with random weights, of which LoRA alone is trained.

At equal steps every setting has --epochs epochs. At equal time (--equal-time) each has as many as fit into the time
that the slowest setting takes for --epochs, by the median seconds of a step measured in the first runs. Beside a text
model this small a bank is expensive; beside a large one it costs next to nothing
(benchmarks/training/negatives_cost.py).
"Masks off" is the same data with a source of its own for every recording.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, this folder is the path
from benchmarks.quality.training_runs import METRICS, append_result, compared, markdown, read_results, train_once
from common.errors import UserError, run_script
from store.reading import EmbeddingStore, Split, StoreHeader
from store.writing import write_store
from text_to_audio.loading.batches import batches_per_epoch
from text_to_audio.loading.captions import CaptionSet

SETTINGS = {  # name: store, flags
    "micro / micro": ("masked", "--audio-negatives micro --text-negatives micro"),
    "batch / micro": ("masked", "--audio-negatives batch --text-negatives micro"),
    "bank / micro": ("masked", "--audio-negatives bank --text-negatives micro"),
    "batch / batch": ("masked", "--audio-negatives batch --text-negatives batch"),
    "bank / batch": ("masked", "--audio-negatives bank --text-negatives batch"),
    "bank / micro, same source positive": (
        "masked",
        "--audio-negatives bank --text-negatives micro --same-source positive",
    ),
    "batch / micro, masks off": ("unmasked", "--audio-negatives batch --text-negatives micro"),
    "bank / micro, masks off": ("unmasked", "--audio-negatives bank --text-negatives micro"),
    "batch / batch, masks off": ("unmasked", "--audio-negatives batch --text-negatives batch"),
}
BASE = "batch / micro"
ATTRIBUTES, VALUES, SYNONYMS = 24, 8, 2
NAMED = (4, 9)  # attributes that a caption names: from, to below
FILLERS = ("the", "a", "with", "and", "of", "some", "recording", "piece", "sounds", "very")
SPACE = "synthetic"


class World:
    """The rules that attributes become audio vectors and captions by; `seed` fixes them."""

    def __init__(self, dim: int, noise: float, seed: int):
        self.rng = np.random.default_rng(seed)
        self.noise = noise
        self.hidden = self.rng.standard_normal((ATTRIBUTES * VALUES, 2 * dim)) / np.sqrt(ATTRIBUTES)
        self.copy_of_hidden = 0.3 * self.rng.standard_normal((8, 2 * dim)) / np.sqrt(8)
        self.out = self.rng.standard_normal((2 * dim, dim)) / np.sqrt(2 * dim)

    def audio(self, values: np.ndarray) -> np.ndarray:
        """Attribute values (recordings, ATTRIBUTES) -> audio vectors (recordings, dim) float32."""
        hidden = np.zeros((len(values), self.hidden.shape[1]))
        for attribute in range(ATTRIBUTES):
            hidden += self.hidden[attribute * VALUES + values[:, attribute]]
        hidden += self.rng.standard_normal((len(values), 8)) @ self.copy_of_hidden
        vectors = np.tanh(2 * hidden) @ self.out
        noise = self.noise * vectors.std() * self.rng.standard_normal(vectors.shape)
        return (vectors + noise).astype(np.float32)

    def caption(self, values: np.ndarray) -> str:
        """A caption of one recording's values (ATTRIBUTES,)."""
        named = self.rng.permutation(ATTRIBUTES)[: self.rng.integers(*NAMED)]
        words = [word_of(attribute, values[attribute], self.rng.integers(SYNONYMS)) for attribute in named]
        words += self.rng.choice(FILLERS, 3).tolist()
        return " ".join(words[i] for i in self.rng.permutation(len(words)))

    def split(self, name: str, sources: int, copies: int) -> tuple[Split, np.ndarray]:
        """A split of sources with this many recordings each, a caption to a recording, and its vectors."""
        values = np.repeat(self.rng.integers(VALUES, size=(sources, ATTRIBUTES)), copies, axis=0)
        source = [f"{name}{row // copies}" for row in range(len(values))]
        ids = [f"{each}_{row % copies}" for row, each in enumerate(source)]
        captions = [self.caption(row) for row in values]
        return Split(ids, source, captions, np.arange(len(ids)), ["main"] * len(ids)), self.audio(values)


def word_of(attribute: int, value: int, synonym: int) -> str:
    """One of the words that name a value of an attribute."""
    return f"w{attribute}x{value}x{synonym}"


def write_stores(folder: Path, args: argparse.Namespace) -> None:
    """Write the store "masked", with true sources, and "unmasked", whose train recordings have a source each."""
    world = World(args.audio_dim, args.noise, seed=0)
    splits, vectors = {}, {}
    for name, sources, copies in (
        ("train", args.recordings // args.copies, args.copies),
        ("val", args.gallery // 2, 1),
        ("test", args.gallery, 1),
    ):
        splits[name], vectors[name, SPACE] = world.split(name, sources, copies)
    entry = {"id": "random", "revision": None, "dim": args.audio_dim, "sample_rate": 24_000, "recipe": "none"}
    header = StoreHeader("hidden attributes", None, 0, "float32", {SPACE: entry})
    write_store(folder / "masked.h5", header, splits, vectors)
    train = splits["train"]
    splits["train"] = Split(train.audio_id, train.audio_id, train.caption, train.caption_audio, train.caption_kind)
    write_store(folder / "unmasked.h5", header, splits, vectors)


def write_text_model(folder: Path, width: int, layers: int) -> None:
    """Write a BERT with random weights whose vocabulary is the captions' words."""
    words = [word_of(a, v, s) for a in range(ATTRIBUTES) for v in range(VALUES) for s in range(SYNONYMS)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: number for number, word in enumerate([*special, *FILLERS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    model = BertModel(config)
    with torch.no_grad():  # random layers blur the words; told apart well at the bottom, some of it arrives at the top
        model.embeddings.word_embeddings.weight.normal_(0, 1)
        model.embeddings.position_embeddings.weight.zero_()
    model.save_pretrained(folder)


def epochs_at_equal_time(results: list[dict], epochs: int) -> dict[str, int]:
    """Epochs of each setting in the time that the slowest takes for `epochs`."""
    step = {
        name: statistics.median(each["step_seconds"] for each in found)
        for name in SETTINGS
        if (found := [each for each in results if each["setting"] == name and each["epochs"] == epochs])
    }
    return {name: round(epochs * max(step.values()) / seconds) for name, seconds in step.items()}


def table(results: list[dict], epochs_of: dict[str, int]) -> str:
    """A line per setting that was trained for its number of epochs."""
    chosen = [each for each in results if each["epochs"] == epochs_of.get(each["setting"])]
    base = [each for each in chosen if each["setting"] == BASE]
    rows = []
    for name in SETTINGS:
        found = [each for each in chosen if each["setting"] == name]
        if found:
            step = statistics.median(each["step_seconds"] for each in found)
            minutes = found[0]["steps"] * step / 60
            cells = [*compared(found, base), str(found[0]["steps"]), f"{step:.3f}", f"{minutes:.1f}", str(len(found))]
            rows.append([name, *cells])
    gains = [f"Δ {name}" for name in ("R@1", "R@10", "MRR")]
    header = ["audio / text negatives", *(name.removeprefix("t2a_") for name in METRICS), *gains]
    return markdown([*header, "steps", "s/step", "minutes of steps", "runs"], rows)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="examples: nice -n 19 python -m benchmarks.quality.negatives --equal-time\n"
        "          python -m benchmarks.quality.negatives --recordings 2000 --epochs 2 --seeds 0 --results small.jsonl",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for flag, value, text in (
        ("--recordings", 50_000, "training recordings"),
        ("--copies", 10, "recordings of a source"),
        ("--gallery", 2_000, "unseen test recordings; half as many for validation"),
        ("--audio-dim", 256, "width of the audio space"),
        ("--epochs", 3, "passes over the captions at equal steps"),
        ("--batch-size", 32, "captions in a pass"),
        ("--passes", 8, "passes in a step"),
        ("--width", 128, "width of the text model"),
        ("--layers", 2, "its layers"),
    ):
        parser.add_argument(flag, type=int, default=value, metavar="INT", help=f"{text} (default: %(default)s)")
    for flag, value, text in (
        ("--noise", 0.5, "noise of an audio vector, relative to the rest of it"),
        ("--lr", 2e-3, "learning rate of the head"),
        ("--text-lr", 2e-3, "learning rate of LoRA"),
    ):
        parser.add_argument(flag, type=float, default=value, metavar="FLOAT", help=f"{text} (default: %(default)s)")
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="INT", help="seeds of the runs (default: 0 1 2)")
    add("--settings", nargs="+", choices=SETTINGS, metavar="NAME", help=f"some of: {'; '.join(SETTINGS)} (all)")
    add("--equal-time", action="store_true", help="also train for as long as the slowest setting takes")
    add("--results", type=Path, default=Path("negatives.jsonl"), help="runs in it are passed over (%(default)s)")
    add("--table", action="store_true", help="print the tables of the results there are, and run nothing")
    return parser


def run_missing(args: argparse.Namespace, folder: Path, epochs_of: dict[str, int]) -> None:
    """Train each setting for its epochs with every seed, where that was not done yet."""
    train = CaptionSet.of(EmbeddingStore(folder / "masked.h5").split("train"))
    per_epoch = batches_per_epoch(train.caption_source, args.batch_size * args.passes)
    finished = {(each["seed"], each["setting"], each["epochs"]) for each in read_results(args.results)}
    wanted = [(seed, name, epochs) for seed in args.seeds for name, epochs in epochs_of.items()]
    for seed, name, epochs in tqdm([each for each in wanted if each not in finished], "negatives", unit="run"):
        store, flags = SETTINGS[name]
        steps = epochs * per_epoch
        fixed = (
            f"--data-path {folder / store}.h5 --text-model {folder / 'bert'} --max-length 32 --seed {seed} "
            f"--epochs {epochs} --patience {epochs} --warmup-steps {steps // 10} --lr {args.lr} "
            f"--text-lr {args.text_lr} --batch-size {args.batch_size} --gradient-accumulation-steps {args.passes}"
        )
        entry = train_once(SPACE, [*fixed.split(), *flags.split()], timed=True)
        load = round(psutil.getloadavg()[0], 1)
        run = {"setting": name, "seed": seed, "epochs": epochs, "steps": steps, "load": load}
        append_result(args.results, {**entry, **run, "best_epoch": entry["epoch"]})


def main(argv: list[str] | None = None) -> None:
    """Draw the data, train what is missing, print the tables."""
    args = build_parser().parse_args(argv)
    if args.recordings < args.copies or min(args.copies, args.gallery, args.epochs) < 1:
        raise UserError("expected at least one source, and --copies, --gallery and --epochs of at least 1")
    equal_steps = dict.fromkeys(args.settings or SETTINGS, args.epochs)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not args.table:
            write_stores(folder, args)
            write_text_model(folder / "bert", args.width, args.layers)
            run_missing(args, folder, equal_steps)
            if args.equal_time:
                equal_time = epochs_at_equal_time(read_results(args.results), args.epochs)
                run_missing(args, folder, {each: equal_time[each] for each in equal_steps})
    results = read_results(args.results)
    print(f"text -> audio, {args.gallery} unseen sources; mean ± standard deviation. At equal steps:")
    print(table(results, dict.fromkeys(SETTINGS, args.epochs)))
    if args.equal_time:
        print("\nAt equal time:")
        print(table(results, epochs_at_equal_time(results, args.epochs)))


if __name__ == "__main__":
    run_script(main)
