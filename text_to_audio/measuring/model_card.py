"""The README.md of an exported checkpoint: what it is, how to load it, its metrics, data and licences."""

import json
from pathlib import Path

from transformers import AutoConfig

from common.errors import UserError
from common.hub import fetch_model_folder
from embedding_models.registry import licence_note
from text_to_audio.config import TrainingConfig
from text_to_audio.measuring.summary import FILE_NAME, read_summary
from text_to_audio.model.text_encoder import _pooling, _prefix

SNIPPET = """import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

base = {base}
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModel.from_pretrained(base, dtype=torch.float32), "adapter").eval()
head = load_file("head.safetensors")


@torch.no_grad()
def embed_text(text):
    \"\"\"A unit vector ({audio_dim},) in the standardised audio space.\"\"\"
    tokens = tokenizer([{prefix} + text], truncation=True, max_length={max_length}, return_tensors="pt")
    hidden = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state[0]
    sentence = F.normalize({pool}, dim=-1)
    x = F.rms_norm(sentence, sentence.shape)
    x = F.gelu(F.linear(x, head["layers.0.weight"], head["layers.0.bias"]))
    return F.normalize(F.linear(x, head["layers.3.weight"], head["layers.3.bias"]), dim=-1)


def standardise_audio(vectors):
    \"\"\"Audio vectors (N, {audio_dim}) of the recipe -> what a text vector is compared with, by cosine.\"\"\"
    return F.normalize((vectors - head["mean"]) / head["std"], dim=-1)
"""


def model_card(contents: dict, config: TrainingConfig, checkpoint: Path) -> str:
    """The card as Markdown. Raises `UserError` where the text model's config cannot be read."""
    space = contents.get("audio_space", {})
    return f"""# Text to {config.audio_encoder}: LoRA adapter and projection head

Takes a text about music into the `{config.audio_encoder}` audio space ({config.audio_dim} dimensions), where it is
compared with recordings by cosine. Epoch {contents.get("epoch", "not recorded")} of {checkpoint.name}.

| part | id | revision |
|---|---|---|
| text encoder | `{config.text_model}` | {contents.get("text_model_revision") or "not recorded"} |
| audio encoder | `{space.get("id", "not recorded")}` | {space.get("revision") or "not recorded"} |
| data set | {_dataset(contents)} |

Recipe of the audio vectors: {space.get("recipe", "not recorded")}. Vectors of other recipes do not match.

## Loading

Run in this folder:

```python
{_snippet(config)}```

## Metrics

Validation, at this checkpoint:

{_table(contents.get("metrics") or {})}

Test (`{FILE_NAME}` beside the checkpoint):

{_table(_test_metrics(contents, config, checkpoint))}

## Licences

{licence_note(config.audio_encoder)}
MusicBench, where it is the data set, is CC-BY-SA-3.0. The text encoder has a licence of its own.
"""


def _snippet(config: TrainingConfig) -> str:
    folder = fetch_model_folder(config.text_model, ["config.json"])
    try:
        kind = AutoConfig.from_pretrained(folder).model_type
    except (OSError, ValueError) as error:
        raise UserError(
            f"{config.text_model}: expected a text model's config.json; {str(error).split(chr(10))[0]}"
        ) from error
    return SNIPPET.format(
        base=json.dumps(config.text_model),
        prefix=json.dumps(_prefix(config.instruction, kind)),
        pool="hidden[-1]" if _pooling(config.pooling, kind) == "last" else "hidden.mean(0)",
        max_length=config.max_length,
        audio_dim=config.audio_dim,
    )


def _dataset(contents: dict) -> str:
    dataset = contents.get("dataset", {})
    return f"{dataset.get('name', 'not recorded')} | {dataset.get('revision') or 'not recorded'}"


def _test_metrics(contents: dict, config: TrainingConfig, checkpoint: Path) -> dict:
    """The summary's entry if it is of this checkpoint: of the same epoch, and not older than the file."""
    path = checkpoint.parent / FILE_NAME
    if not path.is_file() or path.stat().st_mtime < checkpoint.stat().st_mtime:
        return {}
    entry = read_summary(path).get(config.audio_encoder, {})
    return entry if "epoch" in entry and entry["epoch"] == contents.get("epoch") else {}


def _table(metrics: dict) -> str:
    if not metrics:
        return "not measured"
    rows = [f"| {name} | {round(value, 4)} |" for name, value in metrics.items() if isinstance(value, int | float)]
    return "\n".join(["| metric | value |", "|---|---|", *rows])
