"""Text models of many families and states: they serve, or end in one line before anything is written."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import UserError
from helpers.text_families import make_family
from text_to_audio.config import TrainingConfig
from text_to_audio.model.checks import check_recomputation, check_text_encoder
from text_to_audio.model.pooling import cls_pool, last_token_pool, mean_pool
from text_to_audio.model.pretrained import resolved_pooling
from text_to_audio.model.text_encoder import TextEncoder


def make_config(folder, **options):
    config = TrainingConfig("muq", text_model=str(folder), device="cpu", **{"max_length": 64, **options})
    config.pooling = resolved_pooling(config)
    return config


@pytest.fixture
def bert(tmp_path):
    make_family("BERT", tmp_path / "bert")
    return tmp_path / "bert"


def pooling_file(folder, values):
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling/config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False}, "mean"),
        ({"pooling_mode_cls_token": False, "pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "cls"}, "cls"),
    ],
)
def test_pooling_follows_the_model_s_own_file(bert, values, expected):
    pooling_file(bert, values)
    assert resolved_pooling(make_config(bert, pooling="auto")) == expected
    assert make_config(bert, pooling="mean").pooling == "mean"
    assert TextEncoder(TrainingConfig("muq", text_model=str(bert), device="cpu", max_length=64)).pooling == "mean"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"pooling_mode_max_tokens": True}, "asks for pooling by max, expected one of last, mean, cls"),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, "asks for pooling by cls and max"),
        ({}, "asks for pooling by nothing"),
        ([], "expected JSON that says how"),
    ],
)
def test_a_way_of_pooling_that_is_not_here_is_refused_by_name(bert, values, expected):
    pooling_file(bert, values)
    with pytest.raises(UserError, match=expected):
        make_config(bert)
    assert make_config(bert, pooling="cls").pooling == "cls"


def test_the_three_ways_on_either_side_of_the_padding():
    hidden = torch.arange(24.0).reshape(2, 4, 3)
    right, left = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert torch.equal(cls_pool(hidden, right), hidden[[0, 1], [0, 0]])
    assert torch.equal(cls_pool(hidden, left), hidden[[0, 1], [2, 0]])
    assert torch.equal(last_token_pool(hidden, left), hidden[[0, 1], [3, 3]])
    assert torch.equal(mean_pool(hidden, left)[0], hidden[0, 2:].mean(0))


def damage_missing_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def damage_other_names(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({f"other.{name}": each for name, each in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def damage_cut(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def damage_pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n")


def damage_architecture(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert-of-next-year"}))


def damage_tokenizer(folder):
    for path in folder.glob("token*"):
        path.unlink()


def damage_words(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word: vocabulary[word] for word in ("[UNK]", "[PAD]", "[CLS]", "[SEP]")}
    tokenizer["pre_tokenizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def damage_nan(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.position_embeddings.weight"][60:] = np.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (damage_missing_weight, r"found 1 of \d+ missing.*encoder.layer.1.output.dense.weight"),
        (damage_other_names, r"found \d\d of \d+ missing"),
        (damage_cut, "expected a text model in the Hugging Face format"),
        (damage_pointer, "model.safetensors: Git LFS pointers"),
        (damage_architecture, "bert-of-next-year"),
        (damage_tokenizer, "a tokenizer that tells two texts apart"),
        (damage_words, "a tokenizer that tells two texts apart"),
        (damage_nan, "expected finite vectors for texts of up to 64 tokens"),
    ],
)
def test_a_damaged_model_ends_in_one_line(bert, damage, expected):
    damage(bert)
    with pytest.raises(UserError, match=expected) as caught:
        check_text_encoder(TextEncoder(make_config(bert, pooling="mean")))
    assert "\n" not in str(caught.value)


def test_a_pooler_may_be_missing(bert):
    tensors = load_file(bert / "model.safetensors")
    save_file(
        {name: each for name, each in tensors.items() if "pooler" not in name},
        bert / "model.safetensors",
        {"format": "pt"},
    )
    check_text_encoder(TextEncoder(make_config(bert)))


def test_positions_are_those_that_a_token_may_have(tmp_path):
    folder = make_family("RoBERTa", tmp_path / "roberta")  # 66 of them, counted from the padding's, which is 1
    with pytest.raises(UserError, match="has 64 positions, found max_length 65"):
        TextEncoder(make_config(folder, max_length=65))
    check_text_encoder(TextEncoder(make_config(folder, max_length=64)))
    folder = make_family("XLNet", tmp_path / "xlnet")  # says -1: no limit
    check_text_encoder(TextEncoder(make_config(folder, max_length=500)))
    shutil.rmtree(tmp_path / "xlnet")


def test_recomputation_of_a_family_without_blocks(tmp_path):
    """XLM keeps attentions and feed-forward layers in lists of their own: auto goes on without, `on` says so."""
    folder = make_family("XLM", tmp_path / "xlm")
    for setting in ("auto", "off"):
        config = make_config(folder, gradient_checkpointing=setting)
        check_recomputation(TextEncoder(config), config)
    config = make_config(folder, gradient_checkpointing="on")
    with pytest.raises(UserError, match="has no row of layers whose activations could be recomputed"):
        check_recomputation(TextEncoder(config), config)


def test_layers_that_cannot_be_recomputed_are_said_before_the_first_step(bert):
    config = make_config(bert, gradient_checkpointing="on")
    encoder = TextEncoder(config).train()
    state = torch.random.get_rng_state()
    check_recomputation(encoder, config)
    assert all(each.grad is None for each in encoder.parameters())
    assert encoder.training
    assert torch.equal(torch.random.get_rng_state(), state)
    calls = []

    def keeps_state(*_):
        calls.append(0)
        if len(calls) > 1:
            raise RuntimeError("the cache\nhas two of each")

    encoder.model.get_base_model().encoder.layer[0].attention.register_forward_pre_hook(keeps_state)
    with pytest.raises(UserError, match=r"activations cannot be recomputed \(the cache\); take"):
        check_recomputation(encoder, config)


def test_vectors_of_another_width_than_the_config_says(tmp_path):
    folder = make_family("OPT with a narrow end", tmp_path / "opt")
    with pytest.raises(UserError, match="expected vectors of its config's hidden_size 16, found 8 wide"):
        check_text_encoder(TextEncoder(make_config(folder)))
