"""Tiny random text models of many families, in the published format, with a tokenizer that all can use."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = "a calm happy slow fast piano guitar drum song with loud drums and train val test caption naïve – " + " ".join(
    map(str, range(40))
)
DIM, LAYERS, HEADS = 16, 2, 2

_BERT = {
    "hidden_size": DIM, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 24,
    "max_position_embeddings": 66,
}  # fmt: skip
_LLAMA = _BERT | {"num_key_value_heads": 1, "head_dim": 8}
_T5 = {"d_model": DIM, "d_kv": 8, "d_ff": 24, "num_layers": LAYERS, "num_heads": HEADS}

# family -> (config class, model class, fields)
FAMILIES = {
    "BERT": ("BertConfig", "BertModel", _BERT),
    "RoBERTa": ("RobertaConfig", "RobertaModel", _BERT | {"pad_token_id": 1}),
    "XLM-R": ("XLMRobertaConfig", "XLMRobertaModel", _BERT | {"pad_token_id": 1}),
    "MPNet": ("MPNetConfig", "MPNetModel", _BERT | {"pad_token_id": 1}),
    "ALBERT": ("AlbertConfig", "AlbertModel", _BERT | {"embedding_size": 8}),
    "DistilBERT": (
        "DistilBertConfig", "DistilBertModel",
        {"dim": DIM, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 24, "max_position_embeddings": 66},
    ),
    "DeBERTa": (
        "DebertaV2Config", "DebertaV2Model", _BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    ),
    "Electra": ("ElectraConfig", "ElectraModel", _BERT | {"embedding_size": 8}),
    "ModernBERT": (
        "ModernBertConfig", "ModernBertModel", _BERT | {"global_attn_every_n_layers": 2, "local_attention": 8}
    ),
    "Nomic": (
        "NomicBertConfig", "NomicBertModel", _BERT | {"head_dim": 8}
    ),
    "XLNet": ("XLNetConfig", "XLNetModel", {"d_model": DIM, "n_layer": LAYERS, "n_head": HEADS, "d_inner": 24}),
    "Longformer": ("LongformerConfig", "LongformerModel", _BERT | {"attention_window": 8, "pad_token_id": 1}),
    "FNet": ("FNetConfig", "FNetModel", _BERT),
    "Funnel": (
        "FunnelConfig", "FunnelModel",
        {"block_sizes": [1, 1], "d_model": DIM, "n_head": HEADS, "d_head": 8, "d_inner": 24, "num_decoder_layers": 1},
    ),
    "T5 encoder": ("T5Config", "T5Model", _T5),
    "CLIP text": ("CLIPConfig", "CLIPModel", {
        "text_config": _BERT | {"projection_dim": 8},
        "vision_config": _BERT | {"image_size": 8, "patch_size": 4},
        "projection_dim": 8,
    }),
    "GPT-2": ("GPT2Config", "GPT2Model", {"n_embd": DIM, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 66}),
    "OPT": (
        "OPTConfig", "OPTModel",
        {"hidden_size": DIM, "word_embed_proj_dim": DIM, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
         "ffn_dim": 24, "max_position_embeddings": 66},
    ),
    "Llama": ("LlamaConfig", "LlamaModel", _LLAMA),
    "Mistral": ("MistralConfig", "MistralModel", _LLAMA | {"sliding_window": 32}),
    "Qwen3": ("Qwen3Config", "Qwen3Model", _LLAMA),
    "Gemma 3": ("Gemma3TextConfig", "Gemma3TextModel", _LLAMA | {"query_pre_attn_scalar": 8}),
    "EmbeddingGemma": (
        "Gemma3TextConfig", "Gemma3TextModel",
        _LLAMA | {"query_pre_attn_scalar": 8, "use_bidirectional_attention": True, "sliding_window": 32},
    ),
    "Mamba": ("MambaConfig", "MambaModel", {"hidden_size": DIM, "num_hidden_layers": LAYERS, "state_size": 4}),
    "Bloom": ("BloomConfig", "BloomModel", {"hidden_size": DIM, "n_layer": LAYERS, "n_head": HEADS}),
}  # fmt: skip

# what is odd about some more: no list of blocks; vectors narrower than hidden_size (as facebook/opt-350m's)
ODD = {
    "XLM": ("XLMConfig", "XLMModel", {"emb_dim": DIM, "n_layers": LAYERS, "n_heads": HEADS}),
    "OPT with a narrow end": ("OPTConfig", "OPTModel", FAMILIES["OPT"][2] | {"word_embed_proj_dim": 8}),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Words as tokens, between [CLS] and [SEP]; [PAD] is 1, as RoBERTa wants it."""
    found = Tokenizer(models.WordLevel({}, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]"]
    found.train_from_iterator([WORDS], trainers.WordLevelTrainer(special_tokens=special))
    found.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=found, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        eos_token="[SEP]",
    )  # fmt: skip


def make_family(name: str, folder: Path) -> str:
    """Write a tiny model of this family with its tokenizer; returns the folder."""
    words = tokenizer()
    config_name, model_name, fields = (FAMILIES | ODD)[name]
    shared = {"vocab_size": len(words), "pad_token_id": 1, "eos_token_id": 3, "bos_token_id": 2}
    if "text_config" in fields:
        fields = fields | {"text_config": fields["text_config"] | shared}
    config = getattr(transformers, config_name)(**(shared | fields))
    torch.manual_seed(0)
    words.save_pretrained(folder)
    getattr(transformers, model_name)(config).save_pretrained(folder)
    return str(folder)
