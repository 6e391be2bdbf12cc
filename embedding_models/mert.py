"""MERT as a frozen encoder: all its hidden states side by side, 75 frames a second."""

import os

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import HubertConfig, HubertModel

from common.errors import UserError
from embedding_models.base import AudioEmbeddingModel
from embedding_models.registry import ENCODERS
from embedding_models.weights import Tensors, fetch_config, fetch_weights, load_tensors, read_tensors

# What of MERT's config is HuBERT's; dropouts and masking play no part in a frozen encoder.
_HUBERT_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "layer_norm_eps",
    "do_stable_layer_norm",
    "feat_extract_norm",
    "feat_extract_activation",
    "feat_proj_layer_norm",
    "conv_dim",
    "conv_stride",
    "conv_kernel",
    "conv_bias",
    "num_conv_pos_embeddings",
    "num_conv_pos_embedding_groups",
)
# Variants of the architecture that no published MERT-v1 has switched on and HuBERT does not know.
_UNSUPPORTED = ("feature_extractor_cqt", "deepnorm", "conv_pos_batch_norm")


class MertModel(AudioEmbeddingModel):
    """MERT (https://arxiv.org/abs/2306.00107): mono, 24 kHz, 75 frames a second, 25 x 1024 wide as published.

    A frame is the hidden states one after the other: the input of every layer, then the last layer's output
    after the final norm. MERT is HuBERT under other names, so transformers' own `HubertModel` runs it and no
    code from the hub is needed. `model` is a hub id or a folder. Each window is brought to zero mean and unit
    variance where the checkpoint's `preprocessor_config.json` asks for it, as the published one does. With
    `precision="float16"` it runs in half precision on CUDA. Raises `UserError` for files that are not such a
    checkpoint.
    """

    name = "mert"
    channels = 1
    half_precision = True

    def __init__(
        self,
        model: str | os.PathLike = ENCODERS["mert"].weights.id,
        device: str = "auto",
        precision: str = "float32",
        revision: str | None = None,
    ):
        super().__init__(model, revision, device, precision)
        preprocessor, _ = fetch_config(model, "preprocessor_config.json", revision)
        config, path = fetch_config(model, "config.json", revision)
        self.sample_rate = preprocessor.get("sampling_rate", config.get("sample_rate", 24_000))
        self._normalise = preprocessor.get("do_normalize", True)
        hubert = _hubert_config(config, path)
        self.frame_dim = (hubert.num_hidden_layers + 1) * hubert.hidden_size
        weights = fetch_weights(model, revision)
        self._hubert = HubertModel(hubert)
        # What is masked in pre-training is never looked up here, and not every checkpoint keeps it.
        load_tensors(self._hubert, _hubert_names(read_tensors(weights)), weights, ("masked_spec_embed",))
        self._hubert.eval().requires_grad_(False).to(self.device)

    def _encode(self, waveforms: torch.Tensor) -> torch.Tensor:
        if self._normalise:
            variance, mean = torch.var_mean(waveforms, dim=1, correction=0, keepdim=True)
            waveforms = (waveforms - mean) / torch.sqrt(variance + 1e-7)
        hubert = self._in_precision(self._hubert)
        output = hubert(waveforms.to(hubert.dtype), output_hidden_states=True)
        # transformers 5 takes the last of `hidden_states` before the final layer norm, 4 took it after.
        return torch.cat([*output.hidden_states[:-1], output.last_hidden_state], dim=2)


def _hubert_config(config: dict, path: os.PathLike) -> HubertConfig:
    if config.get("model_type") != "mert_model":
        raise UserError(f'{path}: model_type: expected "mert_model", found {config.get("model_type")!r}')
    for field in _UNSUPPORTED:
        if config.get(field):
            raise UserError(f"{path}: {field}: expected false, found {config[field]!r}")
    try:
        fields = {name: config[name] for name in _HUBERT_FIELDS if name in config} | {"attn_implementation": "sdpa"}
        return HubertConfig(**fields)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(f"{path}: not the config of a MERT model: {' '.join(str(error).split())}") from error


def _hubert_names(tensors: Tensors) -> Tensors:
    """Give the positional convolution's weight norm its present names (older: weight_g, weight_v)."""
    place = "encoder.pos_conv_embed.conv."
    names = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    renamed = {place + old: place + new for old, new in names.items()}
    return {renamed.get(name, name): tensor for name, tensor in tensors.items()}
