"""A training run: the models, data, optimizer and files it works with, made from its settings."""

from dataclasses import dataclass, field, replace
from logging import Logger
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR

from common.errors import UserError
from store.reading import SPLITS, EmbeddingStore
from text_to_audio.config import TrainingConfig
from text_to_audio.loading.batches import batches_per_epoch
from text_to_audio.loading.captions import CaptionSet
from text_to_audio.loading.step_data import StepReader
from text_to_audio.loading.tokens import TokenCache
from text_to_audio.loading.vectors import AudioVectors
from text_to_audio.loss.bank import build_bank
from text_to_audio.loss.text_queue import TextQueue
from text_to_audio.measuring.curves import CurveWriter
from text_to_audio.measuring.evaluation import Evaluator
from text_to_audio.model.checkpoints import checkpoint_path
from text_to_audio.model.checks import check_recomputation, check_text_encoder
from text_to_audio.model.head import ProjectionHead
from text_to_audio.model.temperature import Temperature
from text_to_audio.model.text_encoder import TextEncoder
from text_to_audio.processes import ALONE, Processes
from text_to_audio.training.optimisation import build_optimizer, build_schedule, warmup_length
from text_to_audio.training.resuming import (
    Best,
    Checkpoint,
    LastCheckpoint,
    Progress,
    check_data,
    curve_start,
    resume_command,
)
from text_to_audio.training.step_models import SpaceModels, StepModels
from text_to_audio.training.stopping import StopRequest


@dataclass(kw_only=True)
class Space(SpaceModels):
    """One audio space of a run: also its recordings, how it is measured, and how well it has done so far.

    writer: after `open_curves` in the process that writes, else None.
    """

    vectors: AudioVectors
    validation: Evaluator
    writer: CurveWriter | None = None
    best: Best = field(default_factory=Best)


@dataclass(kw_only=True)
class Run(StepModels):
    """What the functions of a training hand to each other: what a step needs, its data, and how far the run is.

    config: the user's settings with the measured widths `text_dim` and `audio_dim`.
    """

    log: Logger
    store: EmbeddingStore
    spaces: list[Space]
    captions: CaptionSet
    tokens: TokenCache
    reader: StepReader
    schedule: LambdaLR
    last: LastCheckpoint
    stop: StopRequest
    steps: int
    progress: Progress

    @property
    def best_epoch(self) -> int:
        """The last epoch in which a space's validation R@1 was better than before."""
        return max(space.best.r1_epoch for space in self.spaces)


def prepare(
    config: TrainingConfig, log: Logger, resumed: Checkpoint | None = None, processes: Processes = ALONE
) -> Run:
    """Open the store, load the models, and cache the tokens. Faults in the store come up before any download.

    The run stands at its beginning; `saved_state.restore` takes it to where the checkpoint `resumed` left it.
    """
    store = open_store(config)
    if resumed:
        check_data(resumed, store)
    torch.manual_seed(config.seed)
    if config.torch_device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for the head and the cosines
    text_encoder = TextEncoder(config)
    check_text_encoder(text_encoder)
    check_recomputation(text_encoder, config)
    config = measured(config, store, text_encoder)
    captions = CaptionSet.of(store.split("train"))
    tokens = TokenCache(text_encoder, captions.captions)
    spaces = build_spaces(config, store, text_encoder, processes)
    vectors = {space.name: space.vectors for space in spaces}
    steps = config.epochs * batches_per_epoch(captions.caption_source, config.effective_batch_size)
    heads = [(space.projection, space.temperature) for space in spaces]
    optimizer = build_optimizer(config, text_encoder, heads)
    return Run(
        config=config,
        log=log,
        processes=processes,
        store=store,
        text_encoder=text_encoder,
        spaces=spaces,
        captions=captions,
        tokens=tokens,
        reader=StepReader(config, text_encoder, captions, tokens, vectors, processes),
        queue=TextQueue(config.text_queue, text_encoder.dim, config.torch_device),
        optimizer=optimizer,
        schedule=build_schedule(optimizer, warmup_length(config, steps), steps),
        last=LastCheckpoint(checkpoint_path(config, "last"), resumed),
        stop=StopRequest(f"go on with: {resume_command(config)}", processes),
        steps=steps,
        progress=Progress.of(store, config.audio_encoders),
    )


def open_store(config: TrainingConfig) -> EmbeddingStore:
    """The store; `UserError` where it lacks what the config needs."""
    store = EmbeddingStore(config.data_path)
    for name in config.audio_encoders:
        store.dim(name)
    for name in SPLITS:
        if not store.split(name).caption:
            raise UserError(f"{store.path}: expected recordings with captions in the split {name!r}, found none")
    return store


def measured(config: TrainingConfig, store: EmbeddingStore, text_encoder: TextEncoder) -> TrainingConfig:
    """A copy of the settings with the widths of the text model and, where one space is trained, of its vectors."""
    dims = [store.dim(name) for name in config.audio_encoders]
    return replace(config, text_dim=text_encoder.dim, audio_dim=dims[0] if len(dims) == 1 else 0)


def build_spaces(
    config: TrainingConfig,
    store: EmbeddingStore,
    text_encoder: TextEncoder,
    processes: Processes,
) -> list[Space]:
    """A head, temperature, recordings and validation for each audio space of the config."""
    spaces: list[Space] = []
    for name in config.audio_encoders:
        own = replace(config, audio_encoder=name, audio_dim=store.dim(name))
        projection = build_projection(own, store)
        vectors = AudioVectors(store, "train", name)
        bank = build_bank(own, store, vectors, projection) if config.audio_negatives == "bank" else None
        temperature = Temperature(config.temperature, config.learn_temperature).to(config.torch_device)
        tokens = spaces[0].validation.tokens if spaces else None
        validation = Evaluator(text_encoder, store, "val", own, processes, tokens)
        spaces.append(
            Space(
                config=own, projection=projection, temperature=temperature, bank=bank, vectors=vectors,
                validation=validation,
            )
        )  # fmt: skip
    return spaces


def open_curves(run: Run, resumed: Checkpoint | None) -> None:
    """Begin the TensorBoard curves of each space, or go on with those of the checkpoint `resumed`."""
    for space in run.spaces:
        folder = str(Path(run.config.log_dir) / space.name)
        space.writer = CurveWriter(folder, *curve_start(resumed, space.name))


def build_projection(config: TrainingConfig, store: EmbeddingStore) -> ProjectionHead:
    """The head with the store's statistics, on the config's device; `UserError` where they are not finite."""
    head = ProjectionHead(config.text_dim, config.hidden_dim, config.audio_dim, config.head_dropout)
    try:
        head.set_statistics(*store.statistics(config.audio_encoder), config.standardise)
    except ValueError as error:
        raise UserError(
            f"{store.path}: {config.audio_encoder}: {error}, so a train vector is not; "
            f"prepare_dataset.py --verify names it"
        ) from error
    return head.to(config.torch_device)
