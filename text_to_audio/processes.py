"""The processes that train together under torchrun: which one this is, what it does itself, and sums over all."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from common.errors import UserError
from text_to_audio.config import TrainingConfig

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # one process writes files and downloads while the others wait


@dataclass(frozen=True)
class Processes:
    """This process's number among `count`. One alone (the default) needs no torchrun, and every sum is its own.

    Every method that communicates must be called by all processes, in the same order.
    """

    number: int = 0
    count: int = 1
    device: str | None = None

    def on_own_device(self, config: TrainingConfig) -> TrainingConfig:
        """The settings with this process's GPU, where the processes have one each; else as they are."""
        return replace(config, device=self.device) if self.device else config

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and logs."""
        return self.number == 0

    def own(self, work: Iterable[T]) -> list[T]:
        """This process's share of a list of work, which is the same in every process.

        Dealt out there and back (0 1 1 0 0 1 ...), so that of pieces sorted by size each gets small and large ones.
        """
        order = [*range(self.count), *reversed(range(self.count))]
        return [piece for place, piece in enumerate(work) if order[place % len(order)] == self.number]

    def sum(self, tensors: list[Tensor]) -> None:
        """Replace these tensors, all of one device and float type, by their sums over the processes."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])  # one message instead of hundreds
        distributed.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Sum the gradients over the processes; one that had no work counts as zero."""
        if self.count == 1:
            return
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        self.sum(gradients)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.count == 1:
            return flag
        raised = torch.tensor(int(flag))  # on the CPU: no wait for the GPU
        distributed.all_reduce(raised, op=distributed.ReduceOp.MAX)
        return bool(raised)

    def wait(self) -> None:
        """Wait until every process has come here."""
        self.any(False)

    def leave(self) -> None:
        """Leave the group, in the order of the library."""
        if self.count > 1:
            distributed.destroy_process_group()


ALONE = Processes()


def join(config: TrainingConfig) -> Processes:
    """Join the processes that torchrun has started, on a GPU of its own each (`Processes.on_own_device`).

    The effective batch stays what the config says, so the passes of a step are shared out. Raises `UserError` where
    they cannot be shared evenly, or there are fewer GPUs than processes.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        return ALONE
    passes, local = config.gradient_accumulation_steps, int(os.environ["LOCAL_RANK"])
    if passes % count:
        raise UserError(
            f"expected gradient_accumulation_steps to be a multiple of the {count} processes, which share its passes, "
            f"found {passes}"
        )
    device = None
    if config.torch_device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"expected a GPU for each process of this machine, found {torch.cuda.device_count()}")
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    return Processes(distributed.get_rank(), count, device)
