"""Write tiny checkpoints with random weights in the published formats: three audio encoders and a text encoder.

They stand in where the published weights cannot be had: every script runs on them through the same code. Random
convolutions still tell recordings apart, so that text can be trained on them; the files hold the keys of the
published ones, those that must be ignored included.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import HubertConfig, HubertModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3Model
from transformers import Wav2Vec2ConformerConfig as ConformerConfig
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, this folder is the path
from common.errors import UserError, run_script
from embedding_models.latent import LatentConfig, LatentEncoder
from embedding_models.muq import MuQBackbone
from embedding_models.registry import ENCODERS, EncoderSpec

# Configs hold the fields that decide the shape; the rest is as transformers writes it.
MUQ_CONFIG = {
    "label_rate": 25,
    "num_codebooks": 1,
    "codebook_dim": 16,
    "codebook_size": 64,
    "features": ["melspec_2048"],
    "hop_length": 240,
    "n_mels": 128,
    "conv_dim": 16,
    "encoder_dim": 64,
    "encoder_depth": 3,
    "mask_hop": 0.4,
    "mask_prob": 0.6,
    "is_flash": False,
    "stat": {"melspec_2048_mean": 6.768444971712967, "melspec_2048_std": 18.417922652295623},
    "w2v2_config": ConformerConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_act="swish",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        conformer_conv_dropout=0.0,
        layerdrop=0.0,
        position_embeddings_type="rotary",
    ).to_dict(),
    "use_rvq_target": False,
    "use_vq_target": False,
    "use_encodec_target": False,
    "rvq_ckpt_path": None,
    "recon_loss_ratio": None,
    "rvq_n_codebooks": 8,
    "rvq_multi_layer_num": 1,
}
_TOWER = {"tf_depth": 0, "heads": 8, "dim_head": 64, "attn_dropout": 0.0, "ff_dropout": 0.0, "ff_mult": 4}
MULAN_CONFIG = {
    "mulan": {"sr": 24000, "clip_secs": 10, "dim_latent": 64, "rank_contrast": True},
    "audio_model": {"name": "OpenMuQ/MuQ-large-msd-iter", "model_dim": 64, "use_layer_idx": -1},
    "text_model": {"name": "xlm-roberta-base", "model_dim": None, "use_layer_idx": -1},
    "audio_transformer": {"dim": 96, **_TOWER},
    "text_transformer": {"dim": 96, "max_seq_len": 1024, **_TOWER},
}
MERT_CONFIG = HubertConfig(
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=128,
    conv_dim=(16,) * 7,
    do_stable_layer_norm=True,
    feat_extract_norm="group",
    initializer_range=0.1,  # at 64 wide, the usual 0.02 would leave every layer next to the identity
)
MERT_OWN_FIELDS = {
    "model_type": "mert_model",
    "architectures": ["MERTModel"],
    "auto_map": {"AutoConfig": "configuration_MERT.MERTConfig", "AutoModel": "modeling_MERT.MERTModel"},
    "feature_extractor_cqt": False,
    "feature_extractor_cqt_bins": 336,
    "deepnorm": False,
    "attention_relax": 32.0,
    "conv_pos_batch_norm": False,
    "sample_rate": 24000,
}
MERT_PREPROCESSOR = {
    "do_normalize": True,
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "feature_size": 1,
    "padding_side": "right",
    "padding_value": 0,
    "return_attention_mask": True,
    "sampling_rate": 24000,
}
# On a CPU the finest resolution takes most of the time: no block there, and a quarter of the published rate and
# hop, which is the published spectrogram without its upper three quarters.
LATENT_CONFIG = {
    "sample_rate": 11025,
    "hop": 128,
    "base_channels": 4,
    "multipliers_list": [1, 2, 4, 8, 8],
    "layers_list_encoder": [0, 1, 1, 1, 1],
    "attention_list_encoder": [0, 0, 0, 1, 1],
    "freq_downsample_list": [1, 0, 0, 0],
    "heads": 2,
    "bottleneck_base_channels": 128,
    "num_bottleneck_layers": 1,
    "bottleneck_channels": 64,
}
VOCABULARY = 600
QWEN3_SHAPE = {
    "vocab_size": VOCABULARY + 1,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.1,  # as above: 0.02 is meant for wide layers
}
END = "<|endoftext|>"
# Enough of the language of captions for a tokenizer of some hundred tokens; other words fall back to bytes.
CORPUS = """Instruct: Given a description of music, retrieve recordings that fit it Query:
A slow, sad piano piece in a minor key with soft strings and a warm bass, calm and peaceful.
An upbeat electronic dance track with a heavy bass line, bright synthesizers and a driving drum beat.
Heavy metal with distorted electric guitar riffs, fast drums and a shouting male vocalist.
A jazz saxophone improvises over brushed drums, an upright bass and gentle piano chords.
The acoustic guitar plays a relaxing melody while a female singer hums; the tempo is moderate.
This folk song features a banjo, a fiddle and hand claps. The recording is noisy and in mono.
An energetic orchestral piece with brass, timpani and violins, suitable for an action film trailer.
The chord progression is Am, F, C, G. The key of this song is A minor. The tempo is 120 beats per minute.
Ambient pads with long reverb, distant bells and no percussion make a dreamy, mysterious atmosphere.
""".splitlines()


def copied(tensors: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """Copy tensors for a file, with `prefix` before their names."""
    return {prefix + name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def probe_sounds(samples: int = 24_000) -> torch.Tensor:
    """Make eight mixtures of decaying tones and noise, (8, samples), to set running statistics with."""
    time = torch.arange(samples) / 24_000
    pitches = 55 * 2 ** (6 * torch.rand(8, 12))
    decays = torch.exp(-4 * torch.rand(8, 12)[..., None] * (time * 2 % 1))
    tones = (torch.sin(2 * torch.pi * pitches[..., None] * time) * decays).mean(dim=1)
    return 0.5 * tones + 0.02 * torch.rand(8, 1) * torch.randn(8, samples)


def muq_backbone(config: dict) -> MuQBackbone:
    """Build MuQ with random weights and batch norms that have seen sound."""
    backbone = MuQBackbone(config)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = None  # running statistics are the plain mean over what was seen
    with torch.no_grad():
        backbone.train()(probe_sounds())
    return backbone.eval()


def muq_tensors(config: dict) -> dict[str, torch.Tensor]:
    """Give MuQ's tensors by their published names, those that only pre-training needs included."""
    width, bins = config["encoder_dim"], config["n_mels"] * 4
    codes, code_width = config["codebook_size"], config["codebook_dim"]
    unused = {
        "cls_token": torch.randn(width),
        "conformer.pos_conv_embed.conv.bias": torch.zeros(width),
        "conformer.pos_conv_embed.conv.parametrizations.weight.original0": torch.rand(1, 1, 128),
        "conformer.pos_conv_embed.conv.parametrizations.weight.original1": torch.randn(width, width // 16, 128),
        "linear.bias": torch.zeros(codes),
        "linear.weight": torch.randn(codes, width),
        "quantizer_melspec_2048.codebook": torch.randn(codes, code_width),
        "quantizer_melspec_2048.random_projection": torch.randn(bins, code_width),
    }
    return copied({**muq_backbone(config).state_dict(), **unused}, "model.")


def write_muq(out: Path, config: dict = MUQ_CONFIG, mulan_config: dict = MULAN_CONFIG) -> None:
    """Write `muq_large` (the backbone) and `muq_mulan` (backbone, audio head, text tower), as safetensors."""
    backbone = muq_tensors(config)
    width, latent = mulan_config["audio_transformer"]["dim"], mulan_config["mulan"]["dim_latent"]
    projection = nn.Linear(config["encoder_dim"], width)
    to_latents = nn.Linear(width, latent)
    unused = {
        "mulan.audio.aggregator.weight": torch.randn(1, 25, 1),
        "mulan.audio.aggregator.bias": torch.zeros(1),
        "mulan.contrast.temperatures": torch.ones(1, 1),
        "mulan.text.proj.weight": torch.randn(width, 8),
        "mulan.text_to_latents.weight": torch.randn(latent, width),
        "mulan.text_to_latents.bias": torch.zeros(latent),
    }
    mulan = {
        **copied(backbone, "mulan.audio.model."),
        **copied(projection.state_dict(), "mulan.audio.proj."),
        **copied(to_latents.state_dict(), "mulan.audio_to_latents."),
        **unused,
    }
    for name, written, tensors in (("muq_large", config, backbone), ("muq_mulan", mulan_config, mulan)):
        (out / name).mkdir(exist_ok=True)
        write_json(out / name / "config.json", written)
        save_file(tensors, out / name / "model.safetensors", metadata={"format": "pt"})


def write_mert(out: Path, config: HubertConfig = MERT_CONFIG) -> None:
    """Write `mert`: a pickled state with weight_g and weight_v, and the config of the remote code."""
    folder = out / "mert"
    folder.mkdir(exist_ok=True)
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    tensors = {}
    for name, tensor in copied(HubertModel(config).state_dict()).items():
        for new, old in names.items():
            name = name.replace(new, old)
        tensors[name] = tensor
    torch.save(tensors, folder / "pytorch_model.bin")
    write_json(folder / "config.json", {**config.to_dict(), **MERT_OWN_FIELDS})
    write_json(folder / "preprocessor_config.json", MERT_PREPROCESSOR)


def follow_energy(encoder: LatentEncoder) -> None:
    """Let random weights follow a spectrum's energy instead of its phase, which tells recordings nothing.

    The first activation gets each signal and its negative, and what comes next adds the two: a rectifier. That
    level's shortcut and the other residual branches are small (before training, the published branches are zero).
    """
    down, first, *blocks = encoder.down_layers
    half = down.c.out_channels // 2
    with torch.no_grad():
        down.c.weight[half:] = -down.c.weight[:half]
        down.c.bias.zero_()
        first.conv1.weight[:, half:] = first.conv1.weight[:, :half]
        first.res_conv.weight.mul_(0.1)
        for block in [*blocks, *encoder.bottleneck_layers]:
            for name, parameter in block.named_parameters():
                if name.startswith(("conv2.", "att.mha.out_proj.")):
                    parameter.mul_(0.3)


def write_music2latent(out: Path, fields: dict = LATENT_CONFIG) -> None:
    """Write `music2latent`: the encoder among a decoder's tensors, and the widths in a config.json."""
    folder = out / "music2latent"
    folder.mkdir(exist_ok=True)
    config = LatentConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    encoder = LatentEncoder(config)
    if fields:
        follow_energy(encoder)
    decoder = nn.Conv1d(config.bottleneck_channels, config.bottleneck_base_channels, 1)
    tensors = {
        **copied(encoder.state_dict(), "encoder."),
        **copied(decoder.state_dict(), "decoder.conv_inp."),
        "conv_out.weight": torch.zeros(2, config.base_channels, 3, 3),
    }
    torch.save({"gen_state_dict": tensors}, folder / "music2latent.pt")
    if fields:  # none: the published widths, as there is no config.json beside the published weights
        write_json(folder / "config.json", fields)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that ends every text with <|endoftext|> itself, as Qwen3-Embedding's does."""
    words = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(words), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    end = (END, tokenizer.token_to_id(END))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A $B {END}", special_tokens=[end]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, padding_side="left", model_max_length=32_768
    )


def write_qwen3(out: Path, shape: dict = QWEN3_SHAPE) -> None:
    """Write `qwen3`: a Qwen3 text model, and its tokenizer."""
    tokenizer = train_tokenizer()
    end = tokenizer.eos_token_id
    config = Qwen3Config(**shape, pad_token_id=end, eos_token_id=end, bos_token_id=None)
    tokenizer.save_pretrained(out / "qwen3")
    Qwen3Model(config).save_pretrained(out / "qwen3")


FOLDERS = {
    "muq": ("muq_mulan", {"backbone": "muq_large"}),
    "mert": ("mert", {}),
    "latent": ("music2latent", {}),
}
"""Audio space -> the folder of its encoder, and those that the encoder's options name."""


def encoder_spec(out: Path, name: str, device: str = "auto") -> EncoderSpec:
    """The encoder of an audio space among what was written into `out`."""
    folder, options = FOLDERS[name]
    named = {option: str(out / other) for option, other in options.items()}
    return EncoderSpec(ENCODERS[name], str(out / folder), device=device, options=named)


WRITERS: tuple[Callable[[Path], None], ...] = (write_muq, write_mert, write_music2latent, write_qwen3)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__.splitlines()[0],
        epilog="example: python -m examples.make_tiny_models --out models --seed 1",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write the five into")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (%(default)s)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Write the five checkpoints."""
    args = build_parser().parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{args.out}: expected a folder to write into ({error.strerror})") from error
    transformers_logging.disable_progress_bar()
    for number, write in enumerate(WRITERS):
        torch.manual_seed(args.seed * len(WRITERS) + number)
        write(args.out)
    for folder in sorted(path for path in args.out.iterdir() if path.is_dir()):
        print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(main)
