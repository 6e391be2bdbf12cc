"""Published checkpoints: where the files are, and their tensors without running code that came with them."""

import json
import os
import zipfile
from pathlib import Path

import safetensors
import torch
from torch import nn

from common.errors import UserError
from common.hub import fetch_model_folder

Tensors = dict[str, torch.Tensor]


class _Placeholder:
    """Stands in for whatever else a checkpoint holds (an optimizer's settings, numpy scalars, ...)."""

    def __new__(cls, *args: object, **kwargs: object) -> "_Placeholder":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Forget the state: nothing of it is used."""


def fetch_config(model: str | os.PathLike, filename: str, revision: str | None = None) -> tuple[dict, Path]:
    """Read a JSON file of a model (a folder or a hub id); returns it and its path."""
    path = fetch_model_folder(model, [filename], revision) / filename
    return read_json(path), path


def read_json(path: Path) -> dict:
    """Read a JSON object; raises `UserError` where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found; expected the model's {path.name} there") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a JSON file, found something unreadable ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def fetch_weights(model: str | os.PathLike, revision: str | None = None) -> Path:
    """Give a model's weights file: `model.safetensors`, else `pytorch_model.bin`.

    The second is asked for only where the first is missing, so that large weights are never fetched twice.
    """
    for filename in ("model.safetensors", "pytorch_model.bin"):
        folder = fetch_model_folder(model, [filename, "config.json"], revision)
        if (folder / filename).is_file():
            return folder / filename
    raise UserError(f"{model}: expected model.safetensors or pytorch_model.bin, found neither in {folder}")


def read_tensors(path: Path, prefix: str = "", section: str | None = None) -> Tensors:
    """Read the tensors whose names begin with `prefix`, which is taken off; others are not kept in memory.

    `section` names the dictionary inside a pickled checkpoint that holds them. Raises `UserError` for a file
    that is not a checkpoint.
    """
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt") as opened:
                names = [name for name in opened.keys() if name.startswith(prefix)]  # noqa: SIM118 (no dict)
                return {name[len(prefix) :]: opened.get_tensor(name) for name in names}
        content = _load_pickle(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found; expected the model's weights there") from error
    except Exception as error:  # an unpickler fails on arbitrary bytes in any way there is
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: expected a PyTorch checkpoint, could not read it ({reason})") from error
    if section is not None and isinstance(content, dict):
        content = content.get(section)
    if not isinstance(content, dict):
        place = f"{path}: {section}" if section else str(path)
        raise UserError(f"{place}: expected a dictionary of tensors, found {type(content).__name__}")
    return {k[len(prefix) :]: v for k, v in content.items() if k.startswith(prefix) and torch.is_tensor(v)}


def _load_pickle(path: Path) -> object:
    """Load a pickled checkpoint with torch's unpickler that knows tensors alone.

    Whatever else is in it becomes a placeholder: published training checkpoints carry such things (reported
    of music2latent.pt), they are not needed, and code out of a downloaded file is never run.
    """
    if not zipfile.is_zipfile(path):  # the format before torch 1.6
        content = torch.load(path, map_location="cpu", weights_only=True)
    else:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_Placeholder, name) for name in foreign]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return content


def load_tensors(module: nn.Module, tensors: Tensors, path: Path, optional: tuple[str, ...] = ()) -> None:
    """Load tensors into a module by name.

    Raises `UserError`, naming the file `path`, for names and shapes that do not fit; those in `optional` may
    be missing.
    """
    expected = module.state_dict()
    missing = [name for name in expected if name not in tensors and name not in optional]
    unexpected = [name for name in tensors if name not in expected]
    for problem, names in (("lacks", missing), ("has unexpected", unexpected)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{path}: not the weights its config describes: {problem} {names[0]}{more}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(expected[name].shape)}, found {tuple(tensor.shape)}"
            raise UserError(f"{path}: {name}: the config asks for shape {shapes}")
    module.load_state_dict(tensors, strict=False)  # what may be missing has been settled above
