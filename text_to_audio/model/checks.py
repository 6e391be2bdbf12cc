"""Does a text model do what training relies on? Asked once, after it is loaded and before anything is written."""

import torch
from torch import Tensor

from common.errors import UserError
from text_to_audio.config import TrainingConfig
from text_to_audio.model.text_encoder import TextEncoder, pad_tokens

SHORT, OTHER = "calm piano", "loud drums"  # of as many words
ALIKE = {False: 0.9999, True: 0.99}  # least cosine of one text's vectors, in float32 and in bf16
# what the model code of the hub's families raises for what it does not take
_FAILURES = (RuntimeError, IndexError, ValueError, TypeError, AttributeError, NotImplementedError)


@torch.no_grad()
def check_text_encoder(encoder: TextEncoder) -> None:
    """Raise `UserError` where two texts cannot be told apart, or a text's vector depends on what it is batched with.

    A text is encoded alone and padded beside one of `max_length` tokens: the vectors must be the same and finite, and
    as wide as the config says. A family that knows no mask, or has too few positions, shows here and not after hours.
    """
    name = encoder.name
    short, other = encoder.tokenise([SHORT, OTHER])
    if short.tolist() == other.tolist():
        raise UserError(f"{name}: expected a tokenizer that tells two texts apart, found the same tokens for both")
    long = encoder.tokenise([f"{OTHER} " * encoder.max_length])[0]
    training = encoder.training
    encoder.eval()
    try:
        alone = encoder.encode(pad_tokens([short], encoder.pad_token))[0]
        beside = encoder.encode(pad_tokens([short, long], encoder.pad_token))
    except _FAILURES as error:
        raise UserError(f"{name}: cannot encode texts of up to {len(long)} tokens ({_first_line(error)})") from error
    finally:
        encoder.train(training)
    if len(alone) != encoder.dim:
        raise UserError(f"{name}: expected vectors of its config's hidden_size {encoder.dim}, found {len(alone)} wide")
    _compare(name, alone, beside, len(long), ALIKE[encoder.bf16])


def check_recomputation(encoder: TextEncoder, config: TrainingConfig) -> None:
    """Raise `UserError` where activations are to be recomputed and the family has no layers for it, or cannot.

    A text goes forward and back once; its gradients are dropped.
    """
    if config.gradient_checkpointing == "on" and not encoder.layers:
        raise UserError(
            f"{encoder.name}: has no row of layers whose activations could be recomputed; take "
            f"--gradient-checkpointing off, or auto, which goes on without"
        )
    if not encoder.recomputed:
        return
    training = encoder.training
    encoder.eval()  # without dropout, which would use up random numbers of the run's
    try:
        encoder([SHORT]).sum().backward()
    except _FAILURES as error:
        raise UserError(
            f"{encoder.name}: its layers' activations cannot be recomputed ({_first_line(error)}); take "
            f"--gradient-checkpointing off"
        ) from error
    finally:
        encoder.train(training)
        encoder.zero_grad(set_to_none=True)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _compare(name: str, alone: Tensor, beside: Tensor, tokens: int, least: float) -> None:
    if not (torch.isfinite(alone).all() and torch.isfinite(beside).all()):
        raise UserError(f"{name}: expected finite vectors for texts of up to {tokens} tokens, found nan or infinity")
    cosine = float(torch.cosine_similarity(alone, beside[0], dim=0))
    if not cosine >= least:
        raise UserError(
            f"{name}: expected the same vector for a text alone and padded beside a longer one, found a cosine of "
            f"{cosine:.4f}: a model that takes padding for text cannot be trained in batches"
        )
