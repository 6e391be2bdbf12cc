"""Export a checkpoint: a PEFT adapter folder, the head as safetensors, the settings, and a model card."""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from peft import LoraConfig, TaskType
from safetensors.torch import save_file

from common.errors import UserError, run_script
from text_to_audio.config import TrainingConfig
from text_to_audio.measuring.model_card import model_card
from text_to_audio.model.checkpoints import read_checkpoint

FILES = ("README.md", "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "config.json",
         "head.safetensors")  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write a checkpoint in formats that peft and safetensors read without this toolkit.",
        epilog="example: python export.py --checkpoint checkpoints/muq_best_r1.pt --out exported/muq",
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a checkpoint written by train.py")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write; an export is replaced")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Write the folder beside its place, then rename it."""
    arguments = build_parser().parse_args(argv)
    contents = read_checkpoint(arguments.checkpoint)
    config = TrainingConfig.from_dict(contents["config"], arguments.checkpoint)
    out = arguments.out.absolute()
    refuse_other_folders(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as work:
            new = Path(work) / "new"
            write_adapter(new / "adapter", contents, config)
            write_head(new / "head.safetensors", contents, config)
            (new / "config.json").write_text(json.dumps(config.as_dict(), indent=2) + "\n", encoding="utf-8")
            card = model_card(contents, config, Path(arguments.checkpoint))
            (new / "README.md").write_text(card, encoding="utf-8")
            if out.exists():
                os.rename(out, Path(work) / "old")
            os.rename(new, out)
    except OSError as error:
        raise UserError(f"{arguments.out}: could not write the export ({error.strerror or error})") from error
    sys.stdout.write(f"written: {arguments.out} ({', '.join(FILES)})\n")


def refuse_other_folders(out: Path) -> None:
    """`UserError` where `out` is there and holds anything but an export: replacing it would lose that."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: expected a folder to write, found a file")
    found = (
        {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()} if out.exists() else set()
    )
    if found and found != set(FILES):
        other = sorted(found - set(FILES)) or sorted(set(FILES) - found)
        raise UserError(f"{out}: expected a new folder or an earlier export, found another folder ({other[0]})")


def write_adapter(folder: Path, contents: dict, config: TrainingConfig) -> None:
    """The LoRA weights under the names that peft gives them on disk; no base weights are needed for it."""
    state = contents["text_encoder_state_dict"]
    names = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in state}
    LoraConfig(
        task_type=TaskType.FEATURE_EXTRACTION,
        base_model_name_or_path=config.text_model,
        inference_mode=True,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # a float serves as well
        lora_dropout=config.lora_dropout,
        target_modules=sorted(names),  # full names, so that a pooler's layers are not meant
    ).save_pretrained(str(folder))
    weights = {name.replace(".default.", "."): value.contiguous() for name, value in state.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def write_head(path: Path, contents: dict, config: TrainingConfig) -> None:
    """Weights of both linear layers and the space's mean and std; the metadata say what they are."""
    names = ("audio_encoder", "text_dim", "hidden_dim", "audio_dim", "standardise", "mean_removed", "std_floor")
    metadata = {"format": "pt", **{name: str(getattr(config, name)) for name in names}}
    save_file({name: value.contiguous() for name, value in contents["projection_state_dict"].items()}, path, metadata)


if __name__ == "__main__":
    run_script(main)
