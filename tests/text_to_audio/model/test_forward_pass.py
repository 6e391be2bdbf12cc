"""The text model in few kernels against plain PEFT: the same hidden states and gradients, fewer calls."""

import importlib
import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer, LlamaConfig, LlamaModel, MistralConfig, MistralModel, Qwen2Config, Qwen2Model

import train
from helpers.stores import make_header, make_splits, make_vectors
from helpers.tiny_text_models import make_bert, make_qwen3
from store.writing import write_store
from text_to_audio.config import TrainingConfig
from text_to_audio.loss.bank import build_bank
from text_to_audio.model import forward_pass as forward_pass_module
from text_to_audio.model.decoder import LayerWeights, Projection, decoder_layer
from text_to_audio.model.forward_pass import DecoderPass, ModulePass
from text_to_audio.model.pretrained import load_pretrained
from text_to_audio.model.text_encoder import TextEncoder, add_lora, token_batches

DROPOUT = 0.2
SHAPE = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3, "sliding_window": None,
}  # fmt: skip
FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2Model), "llama": (LlamaConfig, LlamaModel), "mistral": (MistralConfig, MistralModel),
    "sliding": (MistralConfig, MistralModel),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of small text models of several families with one tokenizer, and the store's."""
    folder = tmp_path_factory.mktemp("models")
    make_qwen3(folder / "qwen3")
    make_bert(folder / "bert")
    for name, (config, model) in FAMILIES.items():
        torch.manual_seed(1)
        shape = SHAPE | ({"sliding_window": 5} if name == "sliding" else {})
        built = model(config(**shape))
        for parameter in built.parameters():
            if parameter.ndim == 1:
                nn.init.uniform_(parameter, 0.5, 1.5)  # norms and biases that are not their first values
        built.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(folder / "qwen3").save_pretrained(folder / name)
    header, splits = make_header(dims={"muq": 6, "latent": 4}), make_splits((24, 3, 3))
    splits["train"].caption = [f"{'calm happy piano ' * (i % 5)}song {i}. A slow drum." for i in range(48)]
    write_store(folder / "embeddings.h5", header, splits, make_vectors(header, splits))
    return folder


class Drawn(nn.Module):
    """Dropout that can be followed."""

    def forward(self, x):
        dropped, self.mask = torch.native_dropout(x, DROPOUT, self.training)
        return dropped if self.training else x


class Following(nn.Module):
    """Dropout with the mask that another has just drawn for the same input."""

    def __init__(self, first):
        super().__init__()
        self._first = [first]

    def forward(self, x):
        return x * self._first[0].mask / (1 - DROPOUT) if self.training else x


def share_masks(backbone):
    """Let projections of one input in a plain PEFT model share a dropout mask, as they do in few kernels."""
    for layer in backbone.layers:
        for names in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
            owner = layer.self_attn if hasattr(layer.self_attn, names[0]) else layer.mlp
            first = Drawn()
            for name in names:
                getattr(owner, name).lora_dropout["default"] = first if name == names[0] else Following(first)


class PlainPass:
    """PEFT's model as it is."""

    def __init__(self, model):
        self.backbone = model.get_base_model()

    def tie(self):
        pass

    def __call__(self, ids, mask, training):
        return self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state


@pytest.fixture
def in_float64(monkeypatch):
    """Float64 throughout: transformers' norms do without their cast to float32."""

    def norm(module, x):
        return module.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon))

    for family in ("qwen3", "qwen2", "llama", "mistral"):
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        (name,) = [each for each in vars(module) if each.endswith("RMSNorm")]
        monkeypatch.setattr(getattr(module, name), "forward", norm)
    torch.set_default_dtype(torch.float64)  # so that the store's statistics and the bank are float64 too
    yield
    torch.set_default_dtype(torch.float32)


def make_run(models, name, *words, plain=False):
    """A run whose LoRA does something; its text model in few kernels, or plain PEFT's with the same masks."""
    fixed = ["--data-path", str(models / "embeddings.h5"), "--device", "cpu", "--text-model", str(models / name)]
    fixed += f"--batch-size 3 --gradient-accumulation-steps 4 --hidden-dim 16 --lora-dropout {DROPOUT}".split()
    words = [*fixed, *([] if "--audio-encoder" in words else ["--audio-encoder", "muq"]), *words]
    config = train.config_from_arguments(train.build_parser().parse_args(words))
    with pytest.MonkeyPatch.context() as patch:
        if plain:
            patch.setattr("text_to_audio.model.text_encoder.forward_pass", lambda model, *_: PlainPass(model))
        run = train.prepare(config, logging.getLogger("test"))
    if plain and name != "bert":
        share_masks(run.text_encoder.model.get_base_model())
    dtype = torch.get_default_dtype()
    for module in run.modules():
        module.to(dtype).train()
    for space in run.spaces:
        if space.bank:
            space.bank = build_bank(space.config, run.store, space.vectors, space.projection)
    for name, value in run.text_encoder.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value, 0, 0.2, torch.Generator().manual_seed(len(name)))
    return run


def gradients(run):
    """Loss of each space and all gradients of a step."""
    run.optimizer.zero_grad()
    losses = train.train_step(run, run.reader.read(run.step, np.arange(0, 44, 4)))
    return losses, {name: p.grad for name, p in run.text_encoder.named_parameters() if p.grad is not None}


OBJECTIVES = {
    "micro": ["--audio-negatives", "micro"],
    "batch": [],
    "cached": ["--text-negatives", "batch"],
    "bank": ["--audio-negatives", "bank", "--same-source", "positive"],
    "joint": ["--audio-encoder", "muq", "latent"],
}


@pytest.mark.parametrize("recomputed", ["0", "1", "all"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["qwen3", "bert"])
def test_gradients_are_plain_peft_s(name, objective, recomputed, models, tmp_path, monkeypatch, in_float64):
    monkeypatch.chdir(tmp_path)
    words = [*OBJECTIVES[objective], "--gradient-checkpointing", "on" if recomputed == "all" else "auto"]
    losses, expected = gradients(make_run(models, name, *words, plain=True))
    with monkeypatch.context() as patch:
        if recomputed == "1":
            patch.setattr(TrainingConfig, "layers_recomputed", lambda *_: 1)
        run = make_run(models, name, *words)
    assert isinstance(run.text_encoder._pass, DecoderPass if name == "qwen3" else ModulePass)
    found_losses, found = gradients(run)
    torch.testing.assert_close(found_losses, losses, atol=1e-10, rtol=0)
    assert found.keys() == expected.keys()
    assert len(found) == {"qwen3": 28, "bert": 24}[name]
    for each, gradient in expected.items():
        assert gradient.abs().max() > 1e-5, each
        torch.testing.assert_close(found[each], gradient, atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", ["qwen3", *FAMILIES])
def test_decoders_of_a_kind(name, models, in_float64):
    """With biases, without norms of queries and keys; one with a window of attention goes by its own modules."""
    config = TrainingConfig("muq", text_model=str(models / name), device="cpu", pooling="mean", lora_dropout=0)
    encoder = TextEncoder(config).double().train()
    assert isinstance(encoder._pass, ModulePass if name == "sliding" else DecoderPass)
    for each, value in encoder.named_parameters():
        if "lora_B" in each:
            nn.init.normal_(value, 0, 0.2, torch.Generator().manual_seed(len(each)))
    plain = add_lora(load_pretrained(config).backbone, config).double().train()
    plain.load_state_dict(encoder.model.state_dict())
    ids, mask = torch.randint(5, 300, (3, 11)), torch.ones(3, 11, dtype=torch.int64)
    mask[0, 7:] = mask[2, 4:] = 0
    weight = torch.randn(3, 11, 32) * mask[..., None]
    hidden, expected = encoder._pass(ids, mask, True), PlainPass(plain)(ids, mask, True)
    torch.testing.assert_close(hidden * mask[..., None], expected * mask[..., None], atol=1e-10, rtol=0)
    for each in (hidden, expected):
        (each * weight).sum().backward()
    for each, value in plain.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(encoder.model.get_parameter(each).grad, value.grad, atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", ["qwen3", "bert"])
def test_a_run_learns_the_same_curve(name, models, tmp_path, monkeypatch):
    """Thirty steps in float32, dropout on: as plain PEFT with the same masks does, but for rounding."""
    monkeypatch.chdir(tmp_path)
    curves = []
    for plain in (True, False):
        run = make_run(models, name, "--lr", "1e-2", "--text-lr", "1e-4", plain=plain)
        curve = []
        for step in range(30):
            curve.append(train.train_step(run, run.reader.read(step, np.arange(step % 4, 44, 4))).item())
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.step += 1
        curves.append(curve)
    assert np.mean(curves[0][-5:]) < np.mean(curves[0][:5]) - 0.1
    np.testing.assert_allclose(*curves, atol=2e-3)
    np.testing.assert_allclose(curves[0][:5], curves[1][:5], atol=2e-5)


def top_level_calls(work):
    """How many aten operators are called, not counting those that an operator calls."""
    work()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    count = 0
    for event in profiler.events():
        above = event.cpu_parent
        while above is not None and not above.name.startswith("aten::"):
            above = above.cpu_parent
        count += event.name.startswith("aten::") and above is None
    return count


def test_a_layer_makes_a_third_of_the_calls(models):
    """Forward and backward, as it was with PEFT's and transformers' own layers, and now."""
    config = TrainingConfig("muq", text_model=str(models / "qwen3"), device="cpu")
    encoder = TextEncoder(config).train()
    backbone = encoder.model.get_base_model()
    layer, ids = backbone.layers[0], torch.ones(3, 11, dtype=torch.int64)
    hidden = backbone.embed_tokens(ids).detach().requires_grad_()
    tables = backbone.rotary_emb(hidden, torch.arange(11)[None])
    mask = torch.ones(3, 1, 11, 11, dtype=torch.bool).tril()

    def plain():
        encoder.zero_grad()
        found = layer(hidden, attention_mask=mask, position_embeddings=tables)
        found[0].sum().backward() if isinstance(found, tuple) else found.sum().backward()

    taken = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward_pass_module, "decoder_layer", lambda *arguments: taken.append(arguments) or arguments[0])
        encoder._pass(ids, None, True)
    _, *tables_and_weights = taken[0]
    cos, sin, weights, *rest = (detached(each) for each in tables_and_weights)

    def few():
        leaves = [each.detach().requires_grad_() for part in weights[3:] for each in (part.a, part.b_t)]
        parts = [Projection(p.weight, p.bias, *leaves[2 * i : 2 * i + 2]) for i, p in enumerate(weights[3:])]
        fresh = hidden.detach().requires_grad_()
        decoder_layer(fresh, cos, sin, LayerWeights(*weights[:3], *parts), *rest).sum().backward()

    own = 8 * 2 + 2 + 3  # the test's leaves, and the sum and its backward
    before, now = top_level_calls(plain), top_level_calls(few) - own
    assert 350 < before < 420
    assert 3 * now <= before - 3


def detached(value):
    return value.detach() if isinstance(value, torch.Tensor) else value


def test_frozen_weights_stay_what_and_where_they_are(models):
    """They become views of one tensor, under their own names, and nothing writes to them."""
    config = TrainingConfig("muq", text_model=str(models / "qwen3"), device="cpu")
    encoder, published = TextEncoder(config), load_pretrained(config).backbone.state_dict()
    frozen = {name: value for name, value in encoder.model.get_base_model().state_dict().items() if "lora" not in name}
    assert {name.replace(".base_layer", "") for name in frozen} == set(published)
    encoder.train()(["calm piano", "slow"]).sum().backward()
    with torch.no_grad():
        encoder.eval()(["calm piano"])
    for name, value in encoder.model.get_base_model().state_dict().items():
        if name in frozen:
            assert torch.equal(value, published[name.replace(".base_layer", "")])
    attention = encoder.model.get_base_model().layers[0].self_attn
    storages = {
        getattr(attention, name).base_layer.weight.untyped_storage().data_ptr() for name in ("q_proj", "k_proj")
    }
    assert len(storages) == 1
    size = encoder._pass.groups[0].weight
    encoder.to("cpu")
    assert encoder._pass.groups[0].weight is size  # nothing is copied where nothing moved
    encoder.double()
    assert encoder._pass.groups[0].weight.dtype == torch.float64
    with torch.no_grad():
        attention.q_proj.base_layer.weight.zero_()
    assert not encoder._pass.groups[0].weight[:32].any()


@pytest.mark.parametrize("name", ["qwen3", "bert"])
def test_half_precision_errs_no_more_than_plain_peft(name, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = {}
    for plain, precision in ((True, "fp32"), (True, "bf16"), (False, "bf16")):
        run = make_run(models, name, "--precision", precision, plain=plain)
        for each in run.text_encoder.model.parameters():
            half = precision == "bf16" and not each.requires_grad
            each.data = each.data.to(torch.bfloat16 if half else torch.float32)
        run.text_encoder._pass.tie()
        steps = []
        for run.step in range(10):
            each_gradient = gradients(run)[1].values()
            assert all(each.dtype == torch.float32 for each in each_gradient)
            steps.append(torch.cat([each.flatten() for each in each_gradient]))
        found[plain, precision] = torch.stack(steps)
    exact = found[True, "fp32"]
    plain, few = (((found[key, "bf16"] - exact).norm(dim=1) / exact.norm(dim=1)).mean() for key in (True, False))
    assert few < 1.2 * plain
    assert plain < 0.1


@pytest.mark.parametrize("name", ["qwen3", "bert"])
def test_peft_s_switch_leaves_lora_out(name, models):
    config = TrainingConfig("muq", text_model=str(models / name), device="cpu")
    torch.manual_seed(0)
    encoder = TextEncoder(config).eval()
    with torch.no_grad():
        untrained = encoder(["calm piano"])  # LoRA starts as nothing
        for each, value in encoder.named_parameters():
            if "lora_B" in each:
                value.normal_(0, 0.2)
        assert (encoder(["calm piano"]) - untrained).abs().max() > 1e-3
        with encoder.model.disable_adapter():
            torch.testing.assert_close(encoder(["calm piano"]), untrained, atol=1e-6, rtol=0)


def test_captions_are_embedded_in_batches_of_tokens():
    lengths = np.array([7, 3, 9, 3, 20, 4])
    batches = token_batches(lengths, 12)
    assert [each.tolist() for each in batches] == [[1, 3, 5], [0], [2], [4]]
    assert all(len(each) * lengths[each].max() <= 12 for each in batches[:3])
    assert token_batches(lengths[:0]) == []
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 192, 1000)
    batches = token_batches(lengths)
    assert sorted(np.concatenate(batches)) == list(range(1000))
    assert all(len(each) * lengths[each].max() <= 8192 for each in batches)
    assert len(batches) < 1.3 * lengths.sum() / 8192
