import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers.stores import make_header, make_splits, make_vectors
from store.reading import EmbeddingStore
from store.writing import write_store
from text_to_audio.loading.captions import source_numbers
from text_to_audio.loading.vectors import AudioVectors
from text_to_audio.loss import bank as bank_module
from text_to_audio.loss.bank import AudioBank, bank_loss, bank_place
from text_to_audio.loss.info_nce import contrastive_loss
from text_to_audio.model.head import ProjectionHead

ROWS = np.array([3, 0, 12, 5, 8])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """13 recordings of 5 sources, of which one has a single recording."""
    folder = tmp_path_factory.mktemp("bank")
    header, splits = make_header("float16"), make_splits((13, 2, 2))
    splits["train"].source_id = [f"source-{row // 3}" for row in range(13)]
    write_store(folder / "e.h5", header, splits, make_vectors(header, splits))
    return EmbeddingStore(folder / "e.h5")


@pytest.fixture
def head(store):
    head = ProjectionHead(4, 8, 6).double()
    head.set_statistics(*store.statistics("muq"), "zscore")
    return head


def make_bank(store, head, place, dtype=torch.float64):
    vectors = AudioVectors(store, "train", "muq")
    return AudioBank(vectors, source_numbers(store.split("train")), head, dtype, place)


def everything(store, head):
    return head.standardise_audio(torch.from_numpy(np.array(store.vectors("train", "muq"))))


@pytest.mark.parametrize("place", ["device", "file"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("same_source", ["mask", "positive"])
@pytest.mark.parametrize(("tile", "start"), [(1, 0.07), (4, 0.01), (5, 1.0), (13, 0.07)])
def test_it_is_the_full_softmax_gradients_included(
    store, head, place, smoothing, same_source, tile, start, monkeypatch
):
    monkeypatch.setattr(bank_module, "TILE_ELEMENTS", tile * 6)
    bank = make_bank(store, head, place)
    assert [len(audio) for _, audio in bank.tiles()] == [tile] * (13 // tile) + [13 % tile] * (13 % tile > 0)
    audio = everything(store, head)
    source = torch.arange(13) // 3
    same = source[ROWS][:, None] == source
    raw = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for way in ("bank", "full"):
        text, temperature = raw.clone().requires_grad_(), torch.tensor(start, dtype=torch.float64, requires_grad=True)
        unit = F.normalize(text, dim=1)
        if way == "bank":
            loss = bank_loss(unit, ROWS, bank, temperature, smoothing, same_source)
        else:
            loss = contrastive_loss(unit @ audio.T, torch.from_numpy(ROWS), temperature, smoothing, same, same_source)
        loss.backward()
        results.append((loss.detach(), text.grad, temperature.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    assert results[0][1].abs().max() > 1e-3


@pytest.mark.parametrize("temperature", [0.07, 0.01])
def test_in_float32_nothing_overflows_or_vanishes(store, temperature, monkeypatch):
    """At 0.01 the scores span 200, and e to the 200 is no float32."""
    monkeypatch.setattr(bank_module, "TILE_ELEMENTS", 6)
    head = ProjectionHead(4, 8, 6)
    head.set_statistics(*store.statistics("muq"), "zscore")
    audio = everything(store, head)
    for text in (audio[ROWS], -audio[ROWS]):
        text = text.clone().requires_grad_()
        found = bank_loss(text, ROWS, make_bank(store, head, "device", torch.float32), temperature)
        (gradient,) = torch.autograd.grad(found, text)
        same = (torch.arange(13) // 3)[ROWS][:, None] == torch.arange(13) // 3
        full = contrastive_loss(text @ audio.T, torch.from_numpy(ROWS), temperature, same_source=same)
        (expected,) = torch.autograd.grad(full, text)
        torch.testing.assert_close(found, full, rtol=1e-5, atol=2e-5)  # scores of 100 have steps of 8e-6
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_a_bank_in_bf16_is_near(store):
    head = ProjectionHead(4, 8, 6)
    head.set_statistics(*store.statistics("muq"), "zscore")
    ((start, tile),) = make_bank(store, head, "device", torch.bfloat16).tiles()
    assert (start, tile.dtype) == (0, torch.bfloat16)  # no copy of it is made
    torch.testing.assert_close(tile.float(), everything(store, head), atol=4e-3, rtol=0)


def test_what_it_knows_of_its_recordings(store, head):
    bank = make_bank(store, head, "file", torch.float32)
    assert len(bank) == 13
    assert bank.nbytes == 13 * 6 * 4
    assert bank.copies.tolist() == [3] * 12 + [1]


def test_wide_banks_are_not_kept_without_a_gpu():
    cpu = torch.device("cpu")
    assert bank_place(47_520 * 1536 * 4, cpu) == "device"
    assert bank_place(47_520 * 76_800 * 4, cpu) == "file"
