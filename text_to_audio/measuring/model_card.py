"""The README.md of an exported checkpoint: what it is, how to load it, its metrics, data and licences."""

import json
from pathlib import Path

from transformers import AutoConfig

from common.errors import UserError
from common.hub import fetch_model_folder
from common.templates import templates_beside
from embedding_models.registry import licence_note
from text_to_audio.config import TrainingConfig
from text_to_audio.measuring.summary import FILE_NAME, read_summary
from text_to_audio.model.pooling import family_pooling
from text_to_audio.model.text_encoder import _prefix

POOLED = {"last": "hidden[-1]", "mean": "hidden.mean(0)", "cls": "hidden[0]"}  # of one text, unpadded
UNKNOWN = "not recorded"

_TEMPLATES = templates_beside(__file__)


def model_card(contents: dict, config: TrainingConfig, checkpoint: Path) -> str:
    """The card as Markdown. Raises `UserError` where the text model's config cannot be read."""
    space, dataset = contents.get("audio_space", {}), contents.get("dataset", {})
    test = _test_metrics(contents, config, checkpoint)
    return _TEMPLATES.get_template("model_card.md").render(
        config=config,
        checkpoint=checkpoint.name,
        epoch=contents.get("epoch", UNKNOWN),
        text_model_revision=contents.get("text_model_revision") or UNKNOWN,
        audio_encoder={key: space.get(key) or UNKNOWN for key in ("id", "revision", "recipe")},
        dataset={key: dataset.get(key) or UNKNOWN for key in ("name", "revision")},
        validation=contents.get("metrics") or {},
        test={name: value for name, value in test.items() if name != "query_gb"},
        query_gb=test.get("query_gb"),
        summary=FILE_NAME,
        encoder_licence=licence_note(config.audio_encoder),
        **_snippet_values(config),
    )


def _snippet_values(config: TrainingConfig) -> dict[str, str]:
    """What the card's snippet needs, as Python: the text model's id, its prompt and its pooling."""
    folder = fetch_model_folder(config.text_model, ["config.json"])
    try:
        kind = AutoConfig.from_pretrained(folder).model_type
    except (OSError, ValueError) as error:
        raise UserError(
            f"{config.text_model}: expected a text model's config.json; {str(error).split(chr(10))[0]}"
        ) from error
    return {
        "base": json.dumps(config.text_model),
        "prefix": json.dumps(_prefix(config.instruction, kind)),
        "pool": POOLED[family_pooling(kind) if config.pooling == "auto" else config.pooling],
    }


def _test_metrics(contents: dict, config: TrainingConfig, checkpoint: Path) -> dict:
    """The summary's entry if it is of this checkpoint: of the same epoch, and not older than the file."""
    path = checkpoint.parent / FILE_NAME
    if not path.is_file() or path.stat().st_mtime < checkpoint.stat().st_mtime:
        return {}
    entry = read_summary(path).get(config.audio_encoder, {})
    return entry if "epoch" in entry and entry["epoch"] == contents.get("epoch") else {}
