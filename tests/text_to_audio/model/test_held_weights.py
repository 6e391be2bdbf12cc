"""Weights that a query on a CPU holds as they were published, against the same weights in float32."""

import pytest
import torch
from transformers import AutoModel

from helpers.tiny_text_models import make_bert, make_qwen3
from text_to_audio.config import TrainingConfig
from text_to_audio.model.checkpoints import model_state, save_checkpoint
from text_to_audio.model.head import ProjectionHead
from text_to_audio.model.held_weights import linear, published_dtype, query_bytes
from text_to_audio.model.inference import embed_texts_batch, load_checkpoint
from text_to_audio.model.pretrained import load_pretrained
from text_to_audio.model.text_encoder import TextEncoder

TEXTS = ["calm piano", "a happy fast song with drum", "slow"]


def published_in(folder, dtype):
    AutoModel.from_pretrained(folder).to(dtype).save_pretrained(folder)
    return folder


def checkpoint_of(text_model, path):
    """A checkpoint whose LoRA is not zero."""
    config = TrainingConfig("muq", text_model=text_model, text_dim=32, audio_dim=24, hidden_dim=16, device="cpu")
    torch.manual_seed(0)
    encoder, head = TextEncoder(config), ProjectionHead(32, 16, 24)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    save_checkpoint(path, model_state(config, encoder, head))
    return path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_vectors_are_those_of_float32_weights(tmp_path, dtype):
    folder = published_in(make_qwen3(tmp_path / "text"), dtype)
    held = load_checkpoint(checkpoint_of(folder, tmp_path / "muq.pt"), "cpu")
    wide = TextEncoder(held.config, load_pretrained(held.config)).eval()
    wide.model.load_state_dict(held.text_encoder.trained_state())
    frozen = [each for each in held.text_encoder.parameters() if each.ndim == 2 and not each.requires_grad]
    assert {each.dtype for each in frozen} == {dtype}
    assert {each.dtype for each in wide.parameters()} == {torch.float32}
    found, expected = (embed_texts_batch(TEXTS, each, held.projection, "cpu") for each in (held.text_encoder, wide))
    assert abs(found - expected).max() < 1e-5
    rounded = load_checkpoint(tmp_path / "muq.pt", "cpu", precision="bf16")  # arithmetic in 16 bits does differ
    other = embed_texts_batch(TEXTS, rounded.text_encoder, rounded.projection, "cpu")
    assert abs(other - expected).max() > 1e-4


def test_what_was_published_in_float32_stays(tmp_path):
    held = load_checkpoint(checkpoint_of(make_qwen3(tmp_path / "text"), tmp_path / "muq.pt"), "cpu")
    assert {each.dtype for each in held.text_encoder.parameters()} == {torch.float32}


def test_an_encoder_of_another_family_is_float32(tmp_path):
    folder = published_in(make_bert(tmp_path / "text"), torch.bfloat16)
    assert published_dtype(tmp_path / "text") == torch.bfloat16
    held = load_checkpoint(checkpoint_of(folder, tmp_path / "muq.pt"), "cpu")
    assert {each.dtype for each in held.text_encoder.parameters()} == {torch.float32}


def test_training_takes_float32(tmp_path):
    config = TrainingConfig("muq", text_model=published_in(make_qwen3(tmp_path), torch.bfloat16), device="cpu")
    assert {each.dtype for each in TextEncoder(config).parameters()} == {torch.float32}


def test_gradients_pass_through_held_weights(tmp_path):
    folder = published_in(make_qwen3(tmp_path / "text"), torch.bfloat16)
    held = load_checkpoint(checkpoint_of(folder, tmp_path / "muq.pt"), "cpu").text_encoder
    wide = TextEncoder(load_checkpoint(tmp_path / "muq.pt", "cpu").config).eval()
    wide.model.load_state_dict(held.trained_state())
    for each in (held, wide):
        each(TEXTS)[:, 0].sum().backward()
    for one, other in zip(held.parameters(), wide.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)


def test_mixed_types_are_not_taken_for_16_bits(tmp_path):
    model = AutoModel.from_pretrained(make_qwen3(tmp_path)).bfloat16()
    model.norm.float()
    model.save_pretrained(tmp_path)
    assert published_dtype(tmp_path) == torch.float32


def test_a_wide_product_in_blocks(monkeypatch):
    monkeypatch.setattr("text_to_audio.model.held_weights._BLOCK_ELEMENTS", 50)
    weight, bias, x = torch.randn(23, 7).bfloat16(), torch.randn(23).bfloat16(), torch.randn(2, 5, 7)
    torch.testing.assert_close(linear(x, weight, bias), x @ weight.float().T + bias.float())
    torch.testing.assert_close(linear(x, weight, None), x @ weight.float().T)


def test_the_memory_of_a_query_counts_each_weight_once(tmp_path):
    folder = published_in(make_qwen3(tmp_path / "text"), torch.bfloat16)
    held = load_checkpoint(checkpoint_of(folder, tmp_path / "muq.pt"), "cpu")
    empty = query_bytes(torch.nn.Module(), torch.float32, [])
    trained = sum(each.numel() for each in held.text_encoder.parameters() if each.requires_grad)
    frozen = sum(each.numel() for each in held.text_encoder.parameters()) - trained
    head = 32 * 16 + 16 + 16 * 24 + 24 + 2 * 24
    counted = query_bytes(held.text_encoder, held.text_encoder.held, [held.projection]) - empty
    assert counted == 2 * frozen + 4 * (trained + head)
