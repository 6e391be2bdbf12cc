"""What one text query costs on a CPU: memory, seconds, and how near the vectors are to those of float32."""

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import torch
from safetensors.torch import save_file
from transformers import AutoModel, Qwen3Config

from benchmarks.own_process import in_own_process, peak_growth
from benchmarks.preparing.full_size import QWEN3_SHAPE
from common.errors import run_script
from examples.make_tiny_models import train_tokenizer
from text_to_audio.config import TrainingConfig
from text_to_audio.model import inference
from text_to_audio.model.checkpoints import head_state, save_checkpoint
from text_to_audio.model.head import ProjectionHead
from text_to_audio.model.held_weights import RUNTIME_BYTES, query_bytes
from text_to_audio.model.pretrained import Pretrained, load_pretrained
from text_to_audio.planning.footprint import text_encoder_on_meta

AUDIO_DIM = 1536
PUBLISHED_LAYERS = 36
BLOCK = 4_194_301  # random numbers that are repeated: a prime, so that no two rows of a matrix are alike
WAYS = ("held", "float32", "rounded", "bf16")
EPILOG = """The text model is a Qwen3 of Qwen3-Embedding-4B's widths with --layers layers and random weights in
bfloat16, or the one that is named. Each way of computing has a process of its own:

  held      what search.py does: weights as they were published, arithmetic in float32
  float32   weights in float32 too, as a training on a CPU has them
  rounded   float32, with the frozen weights rounded to bfloat16 (other numbers only where they were published wider)
  bf16      `search.py --precision bf16`: arithmetic in bfloat16 as well

Times are the process's own (CPU seconds over threads), so that other work on the machine counts less, and the clock's.

examples:
  python -m benchmarks.searching.query_cost --layers 36 --ways held       (8 GB on disk and in memory)
  python -m benchmarks.searching.query_cost --layers 4 8                  (also says what 36 would take)
  python -m benchmarks.searching.query_cost --text-model models/MiniLM"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--layers", type=int, nargs="+", default=[4, 8], help="of the random text models (%(default)s)")
    add("--text-model", metavar="DIR", help="a real text model instead")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="(all)")
    add("--tokens", type=int, default=24, help="of a query: the instruction and a few words (%(default)s)")
    add("--queries", type=int, default=5, help="after one that is not counted (%(default)s)")
    add("--folder", metavar="DIR", help="where the random models are written (a temporary folder)")
    return parser


def write_text_model(folder: Path, layers: int) -> None:
    """A Qwen3 of the published widths with random bfloat16 weights, a file a layer."""
    tokenizer = train_tokenizer()
    numbers = 0.02 * torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
    end = tokenizer.eos_token_id
    shape = QWEN3_SHAPE | {"num_hidden_layers": layers}
    config = Qwen3Config(**shape, pad_token_id=end, eos_token_id=end, bos_token_id=None, dtype="bfloat16")
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in AutoModel.from_config(config).state_dict().items()}
    files: dict[str, dict[str, torch.Size]] = {}
    for name, size in shapes.items():
        part = name.split(".")[1] if name.startswith("layers.") else name.split(".")[0]
        files.setdefault(f"model-{part}.safetensors", {})[name] = size
    for file, sizes in files.items():
        tensors = {
            name: torch.ones(size, dtype=torch.bfloat16)
            if len(size) == 1
            else numbers.bfloat16().repeat(-(-size.numel() // BLOCK))[: size.numel()].view(size)
            for name, size in sizes.items()
        }
        save_file(tensors, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)


def write_checkpoint(path: Path, text_model: Path) -> None:
    """A checkpoint whose LoRA and head are random, for a text model whose weights are not read."""
    config = TrainingConfig("muq", text_model=str(text_model), device="cpu", audio_dim=AUDIO_DIM)
    encoder, generator = text_encoder_on_meta(config), torch.Generator().manual_seed(0)
    config.text_dim = encoder.dim
    lora = {
        name: torch.empty(each.shape).normal_(std=0.01, generator=generator)
        for name, each in encoder.named_parameters()
        if each.requires_grad
    }
    torch.manual_seed(0)
    head = ProjectionHead(config.text_dim, config.hidden_dim, config.audio_dim)
    state = {name.removeprefix("model."): each for name, each in lora.items()}
    save_checkpoint(
        path,
        {"config": config.as_dict(), "text_encoder_state_dict": state, "projection_state_dict": head_state(head)},
    )


def loaded(checkpoint: Path, way: str) -> inference.LoadedCheckpoint:
    """The checkpoint, its text model's weights held and computed with in one of `WAYS`."""

    def in_float32(config: TrainingConfig, for_queries: bool) -> Pretrained:
        parts = load_pretrained(config)
        if way == "rounded":
            for parameter in parts.backbone.parameters():
                parameter.data = parameter.data.bfloat16().float()
        return parts

    if way in ("float32", "rounded"):
        with mock.patch.object(inference, "load_pretrained", in_float32):
            return inference.load_checkpoint(checkpoint, "cpu")
    return inference.load_checkpoint(checkpoint, "cpu", precision="bf16" if way == "bf16" else "")


@torch.no_grad()
def measure(checkpoint: Path, way: str, tokens: int, queries: int) -> dict:
    """Load and ask in this process: seconds, bytes, and the vectors (queries, audio_dim)."""
    found: dict = {"before": psutil.Process().memory_info().rss}
    vectors: list[np.ndarray] = []

    def work() -> None:
        started = time.perf_counter()
        model = loaded(checkpoint, way)
        found["loading"] = time.perf_counter() - started
        encoder, rng = model.text_encoder, np.random.default_rng(0)
        vocabulary = len(encoder.tokenizer)
        clock, own = [], []
        for _ in range(queries + 1):
            ids = torch.from_numpy(rng.integers(0, vocabulary, tokens))
            wall, cpu = time.perf_counter(), time.process_time()
            text = encoder.encode(torch.stack((ids, torch.ones_like(ids)))[:, None])
            vectors.append(model.projection.project_text(text)[0].numpy())
            clock.append(time.perf_counter() - wall)
            own.append((time.process_time() - cpu) / torch.get_num_threads())
        found["clock"], found["own"] = float(np.median(clock[1:])), float(np.median(own[1:]))
        found["counted"] = query_bytes(encoder, next(encoder.parameters()).dtype, [model.projection]) - RUNTIME_BYTES
        found["held"] = psutil.Process().memory_info().rss

    found["peak"] = peak_growth(work) + found["before"]
    return {**found, "vectors": np.stack(vectors)}


def measure_ways(checkpoint: Path, title: str, args: argparse.Namespace) -> dict[str, dict]:
    """Each way in a process of its own; prints a line for each."""
    results: dict[str, dict] = {}
    for way in args.ways:
        found = results[way] = in_own_process(partial(measure, checkpoint, way, args.tokens, args.queries))
        compared = ""
        if "float32" in results:
            near = (found["vectors"] * results["float32"]["vectors"]).sum(1).min()
            compared = f", least cosine to float32 {near:.7f}"
        print(
            f"{title:<10} {way:<8} {found['own']:7.3f} s a query ({found['clock']:.2f} by the clock), loaded in "
            f"{found['loading']:.1f} s, {found['held'] / 1e9:.2f} GB, peak {found['peak'] / 1e9:.2f} (counted: "
            f"{found['counted'] / 1e9:.2f} + {found['before'] / 1e9:.2f}){compared}",
            flush=True,
        )
    return results


def line_through(results: dict[int, dict[str, dict]]) -> None:
    """Print what the published number of layers would take, by the line through the first and the last."""
    few, many = min(results), max(results)
    for way in results[few]:
        at = {
            key: results[few][way][key]
            + (results[many][way][key] - results[few][way][key]) * (PUBLISHED_LAYERS - few) / (many - few)
            for key in ("own", "clock", "held", "peak")
        }
        print(
            f"{PUBLISHED_LAYERS} layers by that line, {way}: {at['own']:.1f} s a query ({at['clock']:.1f} by the "
            f"clock), {at['held'] / 1e9:.1f} GB, peak {at['peak'] / 1e9:.1f}"
        )


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = build_parser().parse_args(argv)
    args.ways = sorted(args.ways, key=lambda way: way != "float32")  # the others are compared with it
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        if args.text_model:
            write_checkpoint(Path(scratch) / "muq.pt", Path(args.text_model))
            measure_ways(Path(scratch) / "muq.pt", Path(args.text_model).name[:10], args)
            return
        results = {}
        for layers in args.layers:
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                write_text_model(Path(folder), layers)
                write_checkpoint(Path(folder) / "muq.pt", Path(folder))
                results[layers] = measure_ways(Path(folder) / "muq.pt", f"{layers} layers", args)
        if len(results) > 1:
            line_through(results)


if __name__ == "__main__":
    run_script(main)
