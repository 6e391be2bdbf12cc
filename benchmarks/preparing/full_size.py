"""Full size without the published weights: the three encoders and one training step at their published widths.

Random weights are written in the published formats and read back by the product's own classes. Each encoder embeds
one clip of 10 s; then one effective batch is trained on with Qwen3's width, fewer layers, and the head for MERT's
76,800 dimensions, in float32 and on a few tokens in bf16. Every part runs in a process of its own, so that the
peak of memory printed is that part's alone.
"""

import argparse
import logging
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, this folder is the path
import train
from benchmarks.own_process import in_own_process
from common.errors import run_script
from examples import make_tiny_models as tiny
from store.reading import Split, StoreHeader
from store.writing import write_store
from text_to_audio.config import TrainingConfig
from text_to_audio.loading.batches import plan_epoch
from text_to_audio.planning.published import TEXT_MODELS

MUQ_CONFIG = tiny.MUQ_CONFIG | {
    "conv_dim": 512,
    "encoder_dim": 1024,
    "encoder_depth": 12,
    "w2v2_config": tiny.MUQ_CONFIG["w2v2_config"] | {"num_attention_heads": 16, "intermediate_size": 4096},
}
MULAN_CONFIG = tiny.MULAN_CONFIG | {
    "mulan": tiny.MULAN_CONFIG["mulan"] | {"dim_latent": 512},
    "audio_model": tiny.MULAN_CONFIG["audio_model"] | {"model_dim": 1024},
    "audio_transformer": tiny.MULAN_CONFIG["audio_transformer"] | {"dim": 768},
}
MERT_SHAPE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "conv_dim": (512,) * 7,
    "do_stable_layer_norm": True,
    "feat_extract_norm": "group",
}
QWEN3_SHAPE = asdict(TEXT_MODELS["Qwen/Qwen3-Embedding-4B"])
del QWEN3_SHAPE["num_hidden_layers"]
MERT_DIM = 76_800
SHORT_TEXT = "calm piano"
LONG_TEXT = (
    "A slow and peaceful piano piece with soft strings and a warm upright bass; the melody is simple, the key is A "
    "minor and the tempo is about 70 beats per minute. It would suit the end of a film, or a quiet evening. {}"
)


WRITERS: dict[str, Callable[[Path], None]] = {
    "muq": partial(tiny.write_muq, config=MUQ_CONFIG, mulan_config=MULAN_CONFIG),
    "mert": partial(tiny.write_mert, config=tiny.HubertConfig(**MERT_SHAPE)),
    "latent": partial(tiny.write_music2latent, fields={}),
}


def write_encoder(name: str, folder: Path) -> None:
    """Write one encoder's checkpoint with random weights at the published widths."""
    torch.manual_seed(0)
    WRITERS[name](folder)


def embed_clip(name: str, folder: Path) -> str:
    """Load an encoder and embed ten seconds of stereo noise at 44.1 kHz."""
    soundfile.write(folder / "clip.wav", np.random.default_rng(0).normal(0, 0.1, (441_000, 2)), 44_100)
    start = time.perf_counter()
    model = tiny.encoder_spec(folder, name).load()
    loaded = time.perf_counter()
    vector = model.embed_file(folder / "clip.wav")
    seconds = time.perf_counter() - loaded
    finite = "finite" if np.isfinite(vector).all() else "NOT FINITE"
    return (
        f"{vector.shape} {vector.dtype}, {finite}, {seconds:.1f} s on {model.device} (loading {loaded - start:.1f} s)"
    )


def write_text_model(layers: int, folder: Path) -> None:
    """Write a Qwen3 of the published width with fewer layers, and a store of random vectors of MERT's width."""
    torch.manual_seed(0)
    tiny.write_qwen3(folder, QWEN3_SHAPE | {"num_hidden_layers": layers})
    entry = {"id": "random", "revision": None, "dim": MERT_DIM, "sample_rate": 24_000, "recipe": "none"}
    header = StoreHeader("random", None, 0, "float32", {"mert": entry})
    for kind, text in (("short", SHORT_TEXT), ("long", LONG_TEXT)):
        splits, vectors = {}, {}
        for split, rows in (("train", 64), ("val", 4), ("test", 4)):
            names = [f"{split}{row}" for row in range(rows)]
            splits[split] = Split(names, names, [text.format(n) for n in names], np.arange(rows), ["main"] * rows)
            vectors[split, "mert"] = np.random.default_rng(rows).normal(size=(rows, MERT_DIM)).astype(np.float32)
        write_store(folder / f"{kind}.h5", header, splits, vectors)


def training_step(precision: str, batch_size: int, accumulation: int, folder: Path) -> str:
    """Take one optimizer step with train.py's own functions."""
    config = TrainingConfig(
        audio_encoder="mert",
        data_path=str(folder / ("long.h5" if precision == "fp32" else "short.h5")),
        text_model=str(folder / "qwen3"),
        instruction="auto" if precision == "fp32" else "",
        log_dir=str(folder / "logs"),
        batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        precision=precision,
        epochs=1,
    )
    run = train.prepare(config, logging.getLogger("full_size"))
    batch = plan_epoch(run.captions.caption_source, config.effective_batch_size, config.seed, epoch=1)[0]
    start = time.perf_counter()
    loss = train.train_step(run, run.reader.read(0, batch)).item()
    run.optimizer.step()
    seconds = time.perf_counter() - start
    trained = sum(p.numel() for group in run.optimizer.param_groups for p in group["params"])
    tokens = int(run.tokens.lengths[batch].sum())
    return (
        f"{len(batch)} captions in {accumulation} passes, {tokens} tokens, {trained / 1e6:.0f} M trained weights, "
        f"loss {loss:.3f}, {seconds:.1f} s on {config.torch_device}"
    )


def _with_peak(task: Callable) -> tuple[str | None, float]:
    return task(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def show(title: str, task: Callable[[], str | None]) -> None:
    """Run a task in a fresh process; print what it says and that process's peak of memory."""
    said, peak = in_own_process(partial(_with_peak, task))
    if said is not None:
        print(f"{title}: {said}, peak {peak:.1f} GB", flush=True)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__.splitlines()[0],
        epilog="example: python -m benchmarks.preparing.full_size --parts mert train",
    )
    names = (*WRITERS, "train")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, help="what to run (all)")
    parser.add_argument("--layers", type=int, default=2, help="layers of the text model, of 36 (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="captions a pass in float32 (%(default)s)")
    parser.add_argument("--passes", type=int, default=2, help="passes a step in float32 (%(default)s)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the parts one after the other; 6 GB of disk are needed for a moment."""
    args = build_parser().parse_args(argv)
    for part in args.parts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if part != "train":
                show(part, partial(write_encoder, part, folder))
                show(part, partial(embed_clip, part, folder))
                continue
            show(part, partial(write_text_model, args.layers, folder))
            full = partial(training_step, "fp32", args.batch_size, args.passes, folder)
            show(f"train float32, {args.layers} of 36 layers", full)
            show(f"train bf16, {args.layers} of 36 layers", partial(training_step, "bf16", 2, 1, folder))


if __name__ == "__main__":
    run_script(main)
