"""Measure a checkpoint on a stored split again, without training."""

import argparse
import json
import sys

import torch
from torch import Tensor

from common.errors import UserError, run_script
from store.reading import EmbeddingStore
from text_to_audio.config import TrainingConfig
from text_to_audio.measuring.evaluation import Evaluator, by_subset
from text_to_audio.measuring.metrics import rounded
from text_to_audio.measuring.summary import table_with_chance
from text_to_audio.model.checkpoints import read_checkpoint
from text_to_audio.model.head import ProjectionHead
from text_to_audio.model.inference import load_checkpoint


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Retrieval metrics of a checkpoint on a split of a store.",
        epilog="examples: python evaluate.py --checkpoint checkpoints/muq_best_r1.pt\n"
        "          python evaluate.py --checkpoint checkpoints/muq_last.pt --split val --json\n"
        "          python evaluate.py --checkpoint checkpoints/muq_best_r1.pt --milvus data/eval.db",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a checkpoint written by train.py")
    parser.add_argument("--data-path", metavar="FILE", help="the store (default: the one it was trained on)")
    parser.add_argument(
        "--split", choices=("test", "val"), default="test", help="recordings to rank (default: %(default)s)"
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)", metavar="STR"
    )
    parser.add_argument(
        "--milvus", metavar="URI", help="also ask a Milvus index made of the split, in this folder (*.db) or server"
    )
    parser.add_argument("--milvus-token", metavar="STR", help="token of the server, or user:password")
    parser.add_argument(
        "--index-type",
        choices=("HNSW", "IVF_FLAT", "FLAT"),
        default="HNSW",
        help="of that index (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON and nothing else")
    return parser


def open_store(checkpoint: str, config: TrainingConfig, data_path: str | None) -> EmbeddingStore:
    """The store to measure on; `UserError` where its space is not as wide as the checkpoint's."""
    store = EmbeddingStore(data_path or config.data_path)
    found = store.dim(config.audio_encoder)
    if found != config.audio_dim:
        raise UserError(
            f"{store.path}: expected {config.audio_encoder} vectors {config.audio_dim} wide, as {checkpoint} was "
            f"trained on, found {found}"
        )
    return store


def through_milvus(
    arguments: argparse.Namespace, projection: ProjectionHead, text: Tensor, store: EmbeddingStore, evaluator: Evaluator
) -> dict[str, float]:
    """Text -> audio recall of the split's captions through a Milvus index of its recordings, in percent.

    text: (captions, text_dim) their sentence embeddings.
    """
    # Here, so that measuring in memory, as training does, needs no Milvus.
    from music_library.evaluation import index_gallery, milvus_recall
    from music_library.index_space import IndexSpace
    from music_library.milvus_index import IndexChoice, VectorDatabase

    gallery, name = evaluator.gallery, evaluator.config.audio_encoder
    about, index = store.encoders[name], IndexChoice(arguments.index_type)
    space = IndexSpace(name, projection, about["recipe"], about["id"])
    with torch.no_grad():
        texts = projection.project_text(text).cpu().numpy()
    collection = f"{name}_{arguments.split}"
    with VectorDatabase(arguments.milvus, arguments.milvus_token, create=True) as database:
        index_gallery(database, collection, space, index, store.vectors(arguments.split, name), gallery)
        return milvus_recall(database, collection, space, index, texts, gallery.captions.caption_audio)


def beside_exact(recall: dict[str, float], exact: dict[str, float], arguments: argparse.Namespace) -> str:
    """Two rows: the recall of the index, and of exact search in memory."""
    lines = [f"text -> audio through {arguments.milvus}, {arguments.index_type}"]
    lines.append(" " * 22 + "".join(f"{name:>12}" for name in recall))
    for title, values in (("Milvus", recall), ("exact, in memory", exact)):
        lines.append(f"{title:<22}" + "".join(f"{values[name]:>12.2f}" for name in recall))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Print the metrics and return them, unrounded."""
    arguments = build_parser().parse_args(argv)
    contents = read_checkpoint(arguments.checkpoint)
    stored = TrainingConfig.from_dict(contents["config"], arguments.checkpoint)
    store = open_store(arguments.checkpoint, stored, arguments.data_path)
    text_encoder, projection, config = load_checkpoint(arguments.checkpoint, arguments.device, contents)
    evaluator = Evaluator(text_encoder, store, arguments.split, config)
    text = evaluator.embed(text_encoder)
    metrics = evaluator.measure(text_encoder, projection, text=text)
    metrics["gallery"] = len(evaluator.gallery)
    recall = through_milvus(arguments, projection, text, store, evaluator) if arguments.milvus else {}
    exact = dict(metrics)
    metrics |= {f"milvus_{name}": value for name, value in recall.items()}
    if arguments.json:
        sys.stdout.write(json.dumps(rounded(metrics), indent=2) + "\n")
        return metrics
    sys.stdout.write(
        f"text -> audio on the {arguments.split} split of {store.path}\n"
        f"{table_with_chance(by_subset(exact, config.audio_encoder))}\n"
    )
    if recall:
        sys.stdout.write(beside_exact(recall, exact, arguments) + "\n")
    sys.stdout.write("\n".join(f"{name}: {value}" for name, value in rounded(metrics).items()) + "\n")
    return metrics


if __name__ == "__main__":
    run_script(main)
