import torch
from safetensors import safe_open
from transformers import AutoModel, AutoTokenizer

from embedding_models import MertModel, MuQEmbeddingModel, MusicLatentSpaceModel
from examples.make_tiny_models import main

REFERENCE_FOLDER = "tests/data/reference"


def keys(path):
    with safe_open(path, "pt") as opened:
        return set(opened.keys())


def test_the_three_encoders_load_and_embed(tiny_models):
    encoders = [
        MuQEmbeddingModel(tiny_models / "muq_mulan", tiny_models / "muq_large", device="cpu"),
        MertModel(tiny_models / "mert", device="cpu"),
        MusicLatentSpaceModel(tiny_models / "music2latent", device="cpu"),
    ]
    for encoder in encoders:
        shape = (2, encoder.sample_rate) if encoder.channels == 1 else (2, 2, encoder.sample_rate)
        vectors = encoder.embed_windows(torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1)
        assert vectors.shape == (2, encoder.dim)
        assert (vectors.std(dim=0) > 0).float().mean() > 0.9  # two sounds, two vectors


def test_files_hold_the_keys_of_the_published_formats(tiny_models, request):
    reference = request.config.rootpath / REFERENCE_FOLDER
    for folder in ("muq_large", "muq_mulan"):
        found, published = (keys(root / folder / "model.safetensors") for root in (tiny_models, reference))
        assert found == published
    tiny, published = (
        torch.load(root / "mert" / "pytorch_model.bin", weights_only=True) for root in (tiny_models, reference)
    )
    assert set(tiny) == set(published)
    state = torch.load(tiny_models / "music2latent" / "music2latent.pt", weights_only=True)["gen_state_dict"]
    assert any(not name.startswith("encoder.") for name in state)


def test_the_text_encoder_is_a_qwen3_whose_tokenizer_ends_texts_itself(tiny_models):
    tokenizer = AutoTokenizer.from_pretrained(tiny_models / "qwen3")
    model = AutoModel.from_pretrained(tiny_models / "qwen3")
    assert model.config.model_type == "qwen3"
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"
    texts = ["Instruct: x\nQuery:calm piano, 120 bpm", "ünïcode ♪ and a much longer sentence than the other one"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert (batch.input_ids[:, -1] == tokenizer.pad_token_id).all()  # the end token
    assert batch.attention_mask[:, -1].all()
    short = batch.attention_mask.sum(dim=1).argmin()
    assert batch.attention_mask[short, 0] == 0  # padded on the left
    assert tokenizer.decode(batch.input_ids[1], skip_special_tokens=True) == texts[1]
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    assert states.shape == (2, batch.input_ids.shape[1], 64)
    assert not torch.allclose(states[0, -1], states[1, -1], atol=1e-2)


def test_a_seed_gives_the_same_files_and_another_does_not(tiny_models, tmp_path):
    main(["--out", str(tmp_path / "same")])
    main(["--out", str(tmp_path / "other"), "--seed", "1"])
    names = [path.relative_to(tiny_models) for path in tiny_models.rglob("*") if path.is_file()]
    assert len(names) == 13
    assert (tmp_path / "same/muq_mulan/model.safetensors").read_bytes() == (
        tiny_models / "muq_mulan/model.safetensors"
    ).read_bytes()
    for name in ("mert/pytorch_model.bin", "music2latent/music2latent.pt"):
        a, b = (torch.load(root / name, weights_only=True) for root in (tiny_models, tmp_path / "same"))
        a, b = (x.get("gen_state_dict", x) for x in (a, b))
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert (tmp_path / "other/qwen3/model.safetensors").read_bytes() != (
        tiny_models / "qwen3/model.safetensors"
    ).read_bytes()
