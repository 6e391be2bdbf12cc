"""Every setting of a training run in one flat dataclass, and the command line that is made from it."""

import argparse
import ast
import inspect
import textwrap
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any, Literal, get_args, get_origin

import torch

from common.device import choose_device
from common.errors import UserError

Pooling = Literal["last", "mean", "cls"]
TEMPERATURE_RANGE = (0.01, 1.0)  # CLIP's bounds for a learnt one
# what the code did when there was no such setting yet: a checkpoint that lacks it was made so
BEFORE = {"mean_removed": 1.0, "std_floor": 0.0, "spread": 1.0}


@dataclass
class TrainingConfig:
    """The settings of one run; the flags of train.py are these names with hyphens.

    The text under each field is its help on the command line. `TrainingConfig(**checkpoint["config"])` gives back
    the run's settings; values that follow from others are properties and are not stored.
    """

    audio_encoder: str
    """audio space to train for, by its name in the store; several names train one text encoder with a head for each
    (joint training)"""
    data_path: str = "data/musicbench_embeddings/embeddings.h5"
    """store of audio vectors and captions, written by prepare_dataset.py"""
    checkpoint_dir: str = "checkpoints"
    """folder for the checkpoints and training_summary.json"""
    log_dir: str = "logs/tensorboard"
    """folder for TensorBoard; each audio encoder has a folder in it"""

    text_model: str = "Qwen/Qwen3-Embedding-4B"
    """text encoder: a Hugging Face model id or a folder in its format"""
    text_dim: int = field(default=0, metadata={"flag": False})
    """width of the text encoder's sentence embedding, read from the model"""
    audio_dim: int = field(default=0, metadata={"flag": False})
    """width of the audio space, read from the store"""
    instruction: str = "auto"
    """task put before each text as Qwen3-Embedding wants it; auto: for Qwen only; "": none; else the task's text"""
    pooling: Literal["auto", Pooling] = "auto"
    """how tokens become one vector; auto: as the model's own 1_Pooling/config.json says, else the mean for models that
    look both ways and the last token for the others; a run's checkpoints say which it was"""
    max_length: int = 192
    """tokens of a text, instruction and end token included; longer texts are cut"""

    hidden_dim: int = 1024
    """width of the projection head's hidden layer"""
    head_dropout: float = 0.1
    """dropout in the projection head"""
    lora_rank: int = 16
    """rank of the LoRA matrices on every linear layer of the text encoder"""
    lora_alpha: float = 32
    """LoRA scale: the update is multiplied by alpha / rank"""
    lora_dropout: float = 0.05
    """dropout before the LoRA matrices"""
    standardise: Literal["zscore", "centre", "none"] = "zscore"
    """what is done to an audio vector before it is given unit length: mean removed and each dimension divided by
    its standard deviation (over the train recordings), mean removed only, or nothing"""
    mean_removed: float = -1.0
    """share of the train recordings' mean that zscore and centre take off, from 0 to 1; -1: as little as leaves the
    space a spread of 0.9"""
    std_floor: float = 0.3
    """zscore divides by a dimension's standard deviation, but by no less than so many times the root mean square of all
    dimensions'; 0: no less than a thousandth of their median"""

    epochs: int = 20
    """most passes over the captions"""
    batch_size: int = 32
    """captions in one forward pass (per GPU)"""
    gradient_accumulation_steps: int = 8
    """forward passes per optimizer step; the effective batch is batch size x this"""
    lr: float = 5e-5
    """learning rate of the projection head"""
    text_lr: float = 2e-5
    """learning rate of LoRA"""
    weight_decay: float = 0.1
    """AdamW weight decay, on matrices only"""
    warmup_steps: int = 2000
    """optimizer steps of linear warm-up; the rest is a cosine to 0. Longer than the run: 10 %% of the steps"""
    temperature: float = 0.07
    """InfoNCE temperature for audio vectors that point everywhere; multiplied by the spread of a space's, which is less
    than 1 where they have a direction in common"""
    spread: float = field(default=1.0, metadata={"flag": False})
    """spread of the audio space, measured: sqrt(1 - |mean unit vector|^2) of the train recordings"""
    learn_temperature: bool = False
    """learn the temperature from there on, by its logarithm, between 0.01 and 1 times the spread, at the head's rate"""
    label_smoothing: float = 0.0
    """share of the target probability spread over all candidates"""
    audio_negatives: Literal["micro", "batch", "bank"] = "batch"
    """recordings a text is compared with: its own forward pass's, the whole effective batch's, or all that are
    trained on"""
    text_negatives: Literal["micro", "batch"] = "micro"
    """texts a recording is compared with: its own forward pass's, or the whole effective batch's, for which each text
    is run twice (gradient caching)"""
    text_queue: int = 0
    """a recording is also compared with so many texts of the steps before, as they were embedded then (no gradient)"""
    same_source: Literal["mask", "positive"] = "mask"
    """other recordings of a text's source in the bank: left out, or right answers too. A batch has none"""
    caption_dropout: float = 0.0
    """probability with which each sentence of a caption is left out, anew every time; one always stays"""
    patience: int = 5
    """epochs of which none is kept as best_r1 before the run stops"""
    baseline: bool = False
    """before training, fit a ridge regression from the frozen text encoder and print its test metrics"""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """arithmetic of the text encoder; auto: bf16 on CUDA, fp32 elsewhere. LoRA and the head are always float32"""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """recompute the layers' activations in the backward pass to save memory: of all, of none, or auto: of as many as
    the memory asks for"""
    memory_gb: float = 0.0
    """10^9 bytes of the GPU's memory to make do with, for gradient_checkpointing auto; 0: all that it has"""
    recomputed_layers: int = field(default=-1, metadata={"flag": False})
    """what gradient_checkpointing auto came to for this run; -1: not looked at yet"""
    compile: Literal["auto", "on", "off"] = "auto"
    """compile the text encoder's layers with torch.compile, for which the first steps take a minute; auto: on CUDA, in
    a run of so many steps that it pays"""
    num_workers: int = 1
    """threads that get the next steps' tokens and audio vectors ready; 0: the training does it itself"""
    device: str = "auto"
    """auto (CUDA where there is one, else the CPU), cpu, cuda or cuda:N"""
    seed: int = 42
    """seed of the initial weights, the batches and dropout"""
    resume: str = ""
    """go on with a run: a NAME_last.pt, or auto for the one in the checkpoint folder, where there is one"""
    save_every_steps: int = 0
    """also save NAME_last.pt after every so many optimizer steps; 0: at the end of each epoch alone"""

    def __post_init__(self) -> None:
        if isinstance(self.compile, bool):  # as configs had it
            self.compile = "on" if self.compile else "off"

    @property
    def audio_encoders(self) -> tuple[str, ...]:
        """The names of the audio spaces: one, or several in joint training."""
        return tuple(self.audio_encoder.split())

    @property
    def run_name(self) -> str:
        """What the run's own files are called: the audio space, or "joint"."""
        return self.audio_encoder if len(self.audio_encoders) == 1 else "joint"

    @property
    def effective_batch_size(self) -> int:
        """Captions per optimizer step, over all processes."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def scaled_temperature(self) -> float:
        """The temperature that cosines of the audio space are divided by: the setting times the space's spread."""
        return self.temperature * self.spread

    @property
    def torch_device(self) -> torch.device:
        """The device that `device` means on this machine."""
        return choose_device(self.device, must_be_there=False)

    @property
    def bf16(self) -> bool:
        """Whether the text encoder computes in bfloat16."""
        if self.precision == "auto":
            return self.torch_device.type == "cuda"
        return self.precision == "bf16"

    def layers_recomputed(self, layers: int) -> int:
        """Of how many of the text encoder's `layers` the activations are recomputed in the backward pass.

        What auto means for a run is looked at when it begins; until then it is all on CUDA and none elsewhere.
        """
        if self.gradient_checkpointing == "auto" and self.recomputed_layers >= 0:
            return min(layers, self.recomputed_layers)
        auto = self.gradient_checkpointing == "auto" and self.torch_device.type == "cuda"
        return layers if auto or self.gradient_checkpointing == "on" else 0

    def as_dict(self) -> dict:
        """Plain values for a checkpoint. The device is left to the machine that loads it, resuming to its user."""
        return {**asdict(self), "device": "auto", "resume": ""}

    @classmethod
    def from_dict(cls, values: dict, source: str) -> "TrainingConfig":
        """The config a checkpoint holds; `UserError`, naming `source`, for settings this version does not know."""
        unknown = sorted(set(values) - {each.name for each in fields(cls)})
        if unknown:
            raise UserError(
                f"{source}: its config has settings this version does not know ({', '.join(unknown)}); "
                f"it was written by a newer version"
            )
        return cls(**{**BEFORE, **values})

    def check(self) -> None:
        """Raise one `UserError` that lists every setting that cannot be."""
        faults = _range_faults(self) + _choice_faults(self) + _device_faults(self)
        if faults:
            raise UserError("settings: " + "; ".join(faults))


# setting: (test, what is expected); the tests are written so that nan fails them
_RANGES = {
    "at least 1": (
        lambda value: value >= 1,
        "hidden_dim lora_rank epochs batch_size gradient_accumulation_steps patience",
    ),
    "at least 8": (lambda value: value >= 8, "max_length"),
    "more than 0": (lambda value: 0 < value < float("inf"), "lr temperature lora_alpha"),
    "0 or more": (
        lambda value: 0 <= value < float("inf"),
        "text_lr weight_decay warmup_steps seed save_every_steps text_queue num_workers memory_gb std_floor",
    ),
    "from 0 to 1, or -1": (lambda value: 0 <= value <= 1 or value == -1, "mean_removed"),
    "from 0 to below 1": (lambda value: 0 <= value < 1, "head_dropout lora_dropout label_smoothing caption_dropout"),
    "a name": (lambda value: bool(value.strip()), "audio_encoder data_path text_model checkpoint_dir log_dir"),
}


def _range_faults(config: TrainingConfig) -> list[str]:
    faults = [
        f"expected {name} to be {expected}, found {getattr(config, name)!r}"
        for expected, (test, names) in _RANGES.items()
        for name in names.split()
        if not test(getattr(config, name))
    ]
    # a text compared with its own recording alone has a loss of 0
    micro = config.audio_negatives == config.text_negatives == "micro"
    compared = config.batch_size if micro else config.effective_batch_size
    if compared == 1 and config.audio_negatives != "bank":
        faults.append("expected at least 2 captions to compare, found a batch of 1")
    twice = sorted({name for name in config.audio_encoders if config.audio_encoders.count(name) > 1})
    if twice:
        faults.append(f"expected each audio_encoder once, found {', '.join(twice)} more than once")
    low, high = TEMPERATURE_RANGE
    if config.learn_temperature and not low <= config.temperature <= high:
        faults.append(f"expected temperature to be from {low:g} to {high:g} to be learnt, found {config.temperature!r}")
    return faults


def _choice_faults(config: TrainingConfig) -> list[str]:
    return [
        f"expected {each.name} to be one of {', '.join(get_args(each.type))}, found {getattr(config, each.name)!r}"
        for each in fields(config)
        if get_origin(each.type) is Literal and getattr(config, each.name) not in get_args(each.type)
    ]


def _device_faults(config: TrainingConfig) -> list[str]:
    try:
        choose_device(config.device)
    except UserError as error:
        return [str(error)]
    return []


def field_help(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, whitespace joined."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for entry, text in pairwise(definition.body):
        if isinstance(entry, ast.AnnAssign) and isinstance(text, ast.Expr):
            texts[ast.unparse(entry.target)] = " ".join(str(ast.literal_eval(text.value)).split())
    return texts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every setting, with the dataclass's default and help."""
    texts = field_help(TrainingConfig)
    for each in fields(TrainingConfig):
        if not each.metadata.get("flag", True):
            continue
        flag = "--" + each.name.replace("_", "-")
        if each.name == "audio_encoder":
            parser.add_argument(flag, required=True, nargs="+", metavar="NAME", help=texts[each.name])
            continue
        if each.type is bool:
            parser.add_argument(flag, action="store_true", default=each.default, help=texts[each.name])
            continue
        options: dict[str, Any]
        if get_origin(each.type) is Literal:
            options = {"choices": get_args(each.type)}
        else:
            assert isinstance(each.type, type)
            options = {"type": each.type, "metavar": each.type.__name__.upper()}
        default = "" if each.default == "" else " (default: %(default)s)"
        parser.add_argument(flag, default=each.default, help=texts[each.name] + default, **options)


def config_from_arguments(arguments: argparse.Namespace) -> TrainingConfig:
    """The checked config of a parsed command line; every fault in one `UserError`."""
    names = {each.name for each in fields(TrainingConfig)}
    values = {name: value for name, value in vars(arguments).items() if name in names}
    config = TrainingConfig(**{**values, "audio_encoder": " ".join(values["audio_encoder"])})
    config.check()
    return config
