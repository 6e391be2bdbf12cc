"""What a run will take before it is started."""

from dataclasses import replace

import torch

from text_to_audio.config import TrainingConfig
from text_to_audio.text_model import TextEncoder, without_weights


def text_encoder_on_meta(config: TrainingConfig) -> TextEncoder:
    """The run's text encoder on torch's meta device, where tensors have no data; its weights are not read.

    `to_empty` under `FakeTensorMode` makes fake tensors of it. It cannot be put together there: PEFT moves modules
    between devices, which those of fake tensors do not bear.
    """
    config = replace(
        config,
        device="meta",
        precision="bf16" if config.bf16 else "fp32",
        gradient_checkpointing="on" if config.checkpoints_activations else "off",
    )
    with torch.device("meta"):
        return TextEncoder(config, without_weights(config))
