"""The registry of encoders: entries against their classes, what it loads and when, licences, flags and specs."""

import argparse
import inspect
import pickle
from dataclasses import replace

import pytest

import embedding_models
import index_library
import prepare_dataset
from common.errors import UserError
from embedding_models.base import AudioEmbeddingModel
from embedding_models.registry import (
    DEFAULTS,
    ENCODERS,
    Encoder,
    EncoderSpec,
    PackageWeights,
    add_encoder_flags,
    find_encoder,
    licence_note,
    spec_from_flags,
)

ENTRIES = pytest.mark.parametrize("entry", ENCODERS.values(), ids=ENCODERS)


@ENTRIES
def test_an_entry_fits_its_class(entry):
    found = entry.load_class()
    assert issubclass(found, AudioEmbeddingModel)
    assert found.name == entry.name
    assert getattr(embedding_models, found.__name__) is found
    parameters = list(inspect.signature(found).parameters)
    assert parameters[0] == "model"
    assert {"device", "precision", "revision", *entry.options} <= set(parameters)


def test_the_seed_s_commands_use_the_seed_s_encoders():
    assert DEFAULTS == ("muq", "mert", "latent")
    assert tuple(prepare_dataset.build_parser().parse_args([]).encoders) == DEFAULTS


def test_another_name_in_the_class_is_found():
    with pytest.raises(TypeError, match="expected the name 'other' of its entry, found 'muq'"):
        replace(ENCODERS["muq"], name="other").load_class()


def test_names_that_are_none():
    with pytest.raises(UserError, match=r"expected an audio space of muq, mert, latent.*, found 'clap'"):
        find_encoder("clap")
    with pytest.raises(AttributeError, match="no attribute 'ClapModel'"):
        embedding_models.ClapModel  # noqa: B018


@pytest.mark.parametrize("script", [prepare_dataset, index_library])
def test_every_encoder_has_its_flags(script):
    flags = {flag for action in script.build_parser()._actions for flag in action.option_strings}
    for entry in ENCODERS.values():
        assert {f"--{entry.name}-model", *(f"--{entry.name}-{option}" for option in entry.options)} <= flags


def test_a_spec_holds_what_the_flags_say():
    parser = argparse.ArgumentParser()
    add_encoder_flags(parser, "the published one")
    muq = ENCODERS["muq"]
    nothing = spec_from_flags(parser.parse_args([]), muq, "cpu", "float32", "lab/x", "v2")
    assert nothing == EncoderSpec(muq, "lab/x", "v2", "cpu", "float32", {})
    args = parser.parse_args(["--muq-model", "here", "--muq-backbone", "there"])
    given = spec_from_flags(args, muq, "cpu", "float32", "lab/x", "v2")
    assert given == EncoderSpec(muq, "here", None, "cpu", "float32", {"backbone": "there"})
    assert spec_from_flags(args, ENCODERS["mert"], "cpu", "float16").options == {}
    assert pickle.loads(pickle.dumps(given)) == given


def test_without_a_model_the_published_one_is_loaded(monkeypatch):
    asked = {}
    monkeypatch.setattr(Encoder, "load_class", lambda self: lambda model, **options: asked.update(options, model=model))
    EncoderSpec(ENCODERS["muq"], options={"backbone": "b"}).load()
    assert asked == {
        "model": "OpenMuQ/MuQ-MuLan-large", "device": "auto", "precision": "float32", "revision": None, "backbone": "b"
    }  # fmt: skip


def test_licences_in_words(monkeypatch):
    assert ENCODERS["muq"].terms == "CC-BY-NC-4.0 (non-commercial)"
    assert "not for commercial use" in licence_note("mert")
    free = replace(ENCODERS["muq"], name="free", licence="ISC", commercial=True)
    monkeypatch.setitem(ENCODERS, "free", free)
    assert free.terms == "ISC (commercial use allowed)"
    assert licence_note("free") == (
        "The published weights of the audio encoder free (OpenMuQ/MuQ-MuLan-large) are ISC, which allows commercial "
        "use of them and of what is made with them."
    )
    assert "is not known" in licence_note("someone's")


def test_the_plan_names_what_a_package_takes(monkeypatch, tmp_path, capsys):
    weights = PackageWeights("MSD_ears", "ears", "0.1.0", 29_000_000)
    packaged = replace(ENCODERS["mert"], name="packaged", weights=weights, licence="ISC", commercial=True)
    monkeypatch.setitem(ENCODERS, "packaged", packaged)
    (tmp_path / "mine.jsonl").write_text("".join(f'{{"audio": "{i}.wav", "caption": "{i}"}}\n' for i in range(9)))
    words = ["--plan", "--device", "cpu", "--dataset", str(tmp_path / "mine.jsonl"), "--encoders", "packaged"]
    assert prepare_dataset.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("encoder     packaged: MSD_ears, weights ISC (commercial use allowed)")
    assert lines[at + 1] == "download    pip install --no-deps ears==0.1.0: 0.03 GB"
