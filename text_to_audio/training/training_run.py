"""A training run: the models, data, optimizer and files it works with, made from its settings."""

from dataclasses import dataclass, replace
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
from text_to_audio.loss.text_queue import TextQueue
from text_to_audio.measuring.curves import CurveWriter
from text_to_audio.model.checkpoints import checkpoint_path
from text_to_audio.model.checks import check_recomputation, check_text_encoder
from text_to_audio.model.text_encoder import TextEncoder
from text_to_audio.processes import ALONE, Processes
from text_to_audio.training.optimisation import build_optimizer, build_schedule, warmup_length
from text_to_audio.training.resuming import (
    Checkpoint,
    LastCheckpoint,
    Progress,
    check_data,
    curve_start,
    resume_command,
)
from text_to_audio.training.spaces import Space, build_spaces
from text_to_audio.training.step_models import StepModels
from text_to_audio.training.stopping import StopRequest


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
        """The latest of the epochs that the spaces keep."""
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
    spaces = build_spaces(config, store, text_encoder, processes, resumed)
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


def open_curves(run: Run, resumed: Checkpoint | None) -> None:
    """Begin the TensorBoard curves of each space, or go on with those of the checkpoint `resumed`."""
    for space in run.spaces:
        folder = str(Path(run.config.log_dir) / space.name)
        space.writer = CurveWriter(folder, *curve_start(resumed, space.name))
