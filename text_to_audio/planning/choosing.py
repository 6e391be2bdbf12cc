"""What `auto` means for a run: pooling, whether its layers are compiled, how many are recomputed."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from store.reading import EmbeddingStore
from text_to_audio.config import TrainingConfig
from text_to_audio.loading.batches import batches_per_epoch
from text_to_audio.model.forward_pass import compiles_by_layer, layers_of
from text_to_audio.model.pretrained import resolved_pooling
from text_to_audio.planning.footprint import Shape, TakeStep, footprint, text_encoder_on_meta

# The CUDA context with its kernels (0.3 to 0.6 GiB by driver and card), cuBLAS's workspaces (8 MiB, 32 on Hopper), and
# what the caching allocator loses by rounding to its blocks. A round figure, not measured.
CUDA_ALLOWANCE = 1 << 30
USABLE = 0.95  # of what is left for tensors: lengths change from step to step, and the allocator's blocks with them
# Steps from which on compiling pays: it took half a minute at the published sizes, and saved a third of a second a step
COMPILING_PAYS = 300

Measure = Callable[[TrainingConfig], int]  # bytes of a run's tensors


def choose(
    config: TrainingConfig, take_step: TakeStep, before: TrainingConfig | None = None, shape: Shape | None = None
) -> None:
    """Set in the config what `auto` means for the whole run, once: the run's checkpoints keep it.

    take_step: the run's own step. before: the config of the run that is gone on with, which has chosen already. shape:
    of the data, where it is not to be read from the store. Raises `UserError` for a store or a text model that is not
    there.
    """
    # a store that is not there is said before the hub is asked for anything
    store = EmbeddingStore(config.data_path) if shape is None else None
    if before is not None:
        _as_before(config, before)
    else:
        config.pooling = resolved_pooling(config)
    on_cuda = config.torch_device.type == "cuda"
    if config.compile == "auto" and not on_cuda:
        config.compile = "off"
    layers_open = config.gradient_checkpointing == "auto" and config.recomputed_layers < 0
    if layers_open and not (on_cuda or config.memory_gb):
        config.recomputed_layers, layers_open = 0, False
    if not layers_open and config.compile != "auto":
        return
    if store is not None:
        shape = Shape.of(store, config.audio_encoders)
    assert shape is not None
    backbone = text_encoder_on_meta(config).model.get_base_model()
    if config.compile == "auto":
        steps = config.epochs * batches_per_epoch(shape.caption_source, config.effective_batch_size)
        config.compile = "on" if steps >= COMPILING_PAYS and compiles_by_layer(backbone) else "off"
    if layers_open:
        layers = len(layers_of(backbone))
        fewest = fewest_layers(config, lambda each: footprint(each, shape, take_step).total, layers, room(config))
        config.recomputed_layers = layers if fewest is None else fewest


def _as_before(config: TrainingConfig, before: TrainingConfig) -> None:
    """Take what the run chose when it began. One from before there was a choice was not compiled."""
    config.pooling, config.mean_removed, config.std_floor = before.pooling, before.mean_removed, before.std_floor
    if config.compile == "auto":
        config.compile = "off" if before.compile == "auto" else before.compile
    if before.gradient_checkpointing == "auto" and before.memory_gb == config.memory_gb:
        config.recomputed_layers = before.recomputed_layers


def room(config: TrainingConfig) -> int:
    """Bytes for tensors: of the memory that is stated, else of what is free on the device."""
    if config.memory_gb:
        return tensor_room(config.memory_gb)
    free, total = torch.cuda.mem_get_info(config.torch_device)
    return int(USABLE * min(free, total - CUDA_ALLOWANCE))


def tensor_room(gigabytes: float) -> int:
    """Bytes for tensors on a card of so many 10^9 bytes."""
    return int(USABLE * (gigabytes * 10**9 - CUDA_ALLOWANCE))


def fewest_layers(config: TrainingConfig, measure: Measure, layers: int, room: int) -> int | None:
    """Of how many of the layers activations must be recomputed so that a step's tensors take at most `room` bytes.

    None where not even all are enough. Each layer that is recomputed saves as much as the next, and the last saves
    nothing (in the backward pass one is there at a time), so that the line between none and all is never too low.
    """
    none, all_of_them = (measure(replace(config, recomputed_layers=number)) for number in (0, layers))
    if none <= room:
        return 0
    if all_of_them > room:
        return None
    return math.ceil(layers * (none - room) / (none - all_of_them))
