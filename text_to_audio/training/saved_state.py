"""What checkpoints hold of a run, and how a run is put back from one."""

from dataclasses import asdict
from typing import Any

import torch

from text_to_audio.model.checkpoints import head_state, model_state, restore_weights
from text_to_audio.training.keeping import Best
from text_to_audio.training.resuming import Checkpoint, Progress
from text_to_audio.training.training_run import Run, Space


def space_contents(run: Run, space: Space, scores: dict[str, float]) -> dict:
    """The checkpoint of one space, for use: config, LoRA weights, head. `scores` are its validation's, if any.

    Plain types, tensors on the CPU.
    """
    return {
        **model_state(space.config, run.text_encoder, space.projection),
        "log_temperature": space.temperature.log.item(),
        "epoch": run.progress.epoch,
        "step": run.step,
        "metrics": scores,
        "started": run.progress.started,
        "audio_space": run.store.encoders[space.name],
        "dataset": {"name": run.store.header.dataset, "revision": run.store.header.revision},
        "text_model_revision": run.text_encoder.revision,
    }


def run_contents(run: Run, scores: dict[str, dict[str, float]]) -> dict:
    """The checkpoint that a run goes on from: everything but frozen weights. Plain types, tensors on the CPU.

    scores: the validation's, by space. Where the run trains one space, its checkpoint for use is part of it.
    """
    whole: dict[str, Any] = {"step": run.step, "epoch": run.progress.epoch}
    if len(run.spaces) == 1:
        whole |= space_contents(run, run.spaces[0], scores.get(run.spaces[0].name, {}))
    else:
        whole |= {"text_encoder_state_dict": run.text_encoder.trained_state(), "config": run.config.as_dict()}
    moments = run.optimizer.state_dict()
    moments["state"] = {number: _on_cpu(state) for number, state in moments["state"].items()}
    random = {"cpu": torch.get_rng_state()}
    if run.config.torch_device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(run.config.torch_device)
    return whole | {
        "optimizer_state_dict": moments,
        "schedule_state_dict": run.schedule.state_dict(),
        "random_state": random,
        "progress": {**asdict(run.progress), "losses": torch.as_tensor(run.progress.losses).tolist()},
        "queue": run.queue.state(),
        "spaces": {space.name: _state_of(run, space, whole) for space in run.spaces},
    }


def _state_of(run: Run, space: Space, whole: dict) -> dict:
    """What a run that goes on needs of a space. A head that is in `whole` is the same tensors, so it is stored once."""
    return {
        "projection_state_dict": whole.get("projection_state_dict") or head_state(space.projection),
        "log_temperature": space.temperature.log.item(),
        "measured": {"mean_removed": space.config.mean_removed, "spread": space.config.spread},
        "audio_space": run.store.encoders[space.name],
        "best": space.best.state(),
        "points": space.writer.points_of(run.step) if space.writer else {},
    }


def restore(found: Checkpoint, run: Run) -> None:
    """Put weights, optimizer, schedule, queue and random states back, and how far the run was.

    Rates follow from the present schedule, so that another number of epochs re-plans what is left of it.
    """
    contents = found.contents
    for space in run.spaces:
        state = contents["spaces"][space.name]
        weights = {
            "text_encoder_state_dict": contents["text_encoder_state_dict"],
            "projection_state_dict": state["projection_state_dict"],
        }
        restore_weights(found.path, weights, run.text_encoder, space.projection)
        with torch.no_grad():
            space.temperature.log.fill_(state["log_temperature"])
        space.best = Best.from_state(state["best"])
    groups = run.optimizer.state_dict()["param_groups"]  # as built for this device; the settings are the same
    run.optimizer.load_state_dict({"state": contents["optimizer_state_dict"]["state"], "param_groups": groups})
    run.schedule.load_state_dict(contents["schedule_state_dict"])
    schedule = run.schedule
    for group, base, factor in zip(run.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * factor(schedule.last_epoch)
    run.queue.restore(contents["queue"])
    device = run.config.torch_device
    torch.set_rng_state(contents["random_state"]["cpu"])
    if device.type == "cuda" and "cuda" in contents["random_state"]:
        torch.cuda.set_rng_state(contents["random_state"]["cuda"], device)
    losses = torch.tensor(contents["progress"]["losses"], dtype=torch.float64, device=device)
    run.progress = Progress(**{**contents["progress"], "losses": losses})
    run.step = contents["step"]


def _on_cpu(state: dict) -> dict:
    return {name: value.detach().cpu() if torch.is_tensor(value) else value for name, value in state.items()}
