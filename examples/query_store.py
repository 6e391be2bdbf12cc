"""Ask a checkpoint for recordings of a prepared store: text queries -> top recordings with their true captions."""

import argparse
import textwrap

import numpy as np
import torch

from common.errors import run_script
from store.reading import SPLITS, EmbeddingStore
from text_to_audio.loading.vectors import AudioVectors
from text_to_audio.measuring.evaluation import caption_scores
from text_to_audio.model.inference import load_checkpoint

EXAMPLES = """examples:
  python -m examples.query_store --checkpoint checkpoints/muq_best_r1.pt "calm piano"
  python -m examples.query_store --checkpoint demo/checkpoints/musicnn_best_r1.pt \\
      --data-path demo/data/musicbench_embeddings/embeddings.h5 "calm piano"      (after make demo)"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog=EXAMPLES,
    )
    parser.add_argument("queries", nargs="+", metavar="QUERY", help="a text, such as a caption")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a checkpoint of train.py")
    parser.add_argument("--data-path", metavar="FILE", help="the store (the one it was trained on)")
    parser.add_argument("--split", choices=SPLITS, default="test", help="recordings to choose from (%(default)s)")
    parser.add_argument("--k", type=int, default=3, help="recordings per query (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    return parser


def known_words(store: EmbeddingStore) -> set[str]:
    """Every word of the captions that the checkpoint was trained on."""
    return {word.strip(".,;:!?").lower() for text in store.split("train").caption for word in text.split()}


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Print the best recordings for each query."""
    args = build_parser().parse_args(argv)
    text_encoder, projection, config = load_checkpoint(args.checkpoint, args.device)
    store = EmbeddingStore(args.data_path or config.data_path)
    split = store.split(args.split)
    vectors = AudioVectors(store, args.split, config.audio_encoder)
    scores = caption_scores(text_encoder(args.queries), projection, vectors, np.arange(len(vectors)))
    words = known_words(store)
    captions = dict(zip(split.caption_audio[::-1].tolist(), split.caption[::-1], strict=True))  # the first of each
    for query, row in zip(args.queries, scores, strict=True):
        new = [word for word in query.lower().split() if word.strip(".,") not in words]
        print(f'\n"{query}"' + (f"   (in no training caption: {', '.join(new)})" if new else ""))
        best = row.topk(min(args.k, len(row)))
        for rank, (score, recording) in enumerate(zip(best.values, best.indices.tolist(), strict=True), start=1):
            caption = textwrap.shorten(captions[recording], 150)
            print(f"  {rank}. {score:.3f}  {split.audio_id[recording]}  {caption}")


if __name__ == "__main__":
    run_script(main)
