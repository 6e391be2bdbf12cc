"""What is known of the default run before anything is fetched: the text model's shape, and a card that was timed.

No library is imported here: prepare_dataset.py adds up what the whole way will take and loads no text model.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class DecoderShape:
    """Widths of a Qwen3 decoder, by the names of its config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int

    @property
    def linear_layers(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of each linear layer of a block: q, k, v, o, gate, up, down."""
        width, inner = self.hidden_size, self.intermediate_size
        heads, groups = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return [(width, heads), (width, groups), (width, groups), (heads, width)] + 2 * [(width, inner)] + [
            (inner, width)
        ]  # fmt: skip

    @property
    def parameters(self) -> int:
        """All weights: embeddings, blocks with their four norms, and the last norm."""
        block = sum(inputs * outputs for inputs, outputs in self.linear_layers)
        norms = 2 * self.hidden_size + 2 * self.head_dim
        return self.vocab_size * self.hidden_size + self.num_hidden_layers * (block + norms) + self.hidden_size

    def lora_parameters(self, rank: int) -> int:
        """Weights of LoRA of this rank on every linear layer of every block."""
        return self.num_hidden_layers * rank * sum(inputs + outputs for inputs, outputs in self.linear_layers)


TEXT_MODELS = {"Qwen/Qwen3-Embedding-4B": DecoderShape(151_665, 2560, 9728, 36, 32, 8, 128)}
"""Hub id -> the shape that its config.json has, for plans where that cannot be had."""


def head_parameters(text_dim: int, hidden_dim: int, audio_dim: int) -> int:
    """Weights of a projection head."""
    return (text_dim + 1) * hidden_dim + (hidden_dim + 1) * audio_dim


def checkpoint_bytes(shape: DecoderShape, audio_dims: Iterable[int], rank: int, hidden_dim: int) -> int:
    """Bytes of what a finished run leaves for each space: two best checkpoints, and two to go on from.

    All is float32: the weights with the space's mean and deviation, and in the latter the optimizer's two moments too.
    """
    total = 0
    for dim in audio_dims:
        trained = shape.lora_parameters(rank) + head_parameters(shape.hidden_size, hidden_dim, dim)
        total += 4 * (4 * (trained + 2 * dim) + 2 * 2 * trained)
    return total


@dataclass(frozen=True)
class MeasuredStep:
    """Seconds of an optimizer step that was timed on a card (docs/measurements.md, "On a GPU").

    captions, tokens: of the step. none, every: seconds with no layer recomputed and with all of them, compiled;
    eager: with none, not compiled. share: of the card's speed in bf16 matrix products, with none recomputed, compiled.
    """

    card: str
    text_model: DecoderShape
    captions: int
    tokens: int
    none: float
    every: float
    eager: float
    eager_every: float
    share: float

    @property
    def caption_tokens(self) -> float:
        """Tokens of a caption on average."""
        return self.tokens / self.captions

    def seconds(self, recomputed: float, compiled: bool) -> float:
        """Of a step with this share of the layers recomputed: by the straight line between none and all.

        With a third of them the line says 1.62 s, and 1.61 s were measured.
        """
        none, every = (self.none, self.every) if compiled else (self.eager, self.eager_every)
        return none + recomputed * (every - none)


H100 = MeasuredStep(
    card="one H100 80 GB",
    text_model=TEXT_MODELS["Qwen/Qwen3-Embedding-4B"],
    captions=256,
    tokens=34_030,
    none=1.37,
    every=2.13,
    eager=1.76,
    eager_every=2.62,
    share=0.45,
)
