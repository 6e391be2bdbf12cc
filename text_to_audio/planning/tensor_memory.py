"""Bytes of live tensors, their peak, and what the peak is made of: real tensors, or fake ones that have no data."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.hooks import RemovableHandle


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of every tensor storage that is alive, while it is entered as a context.

    A storage counts once, however many views it has, from the operation that returns it until nothing holds it: a
    variable, autograd's saved tensors, autocast's cached casts. Under `FakeTensorMode`, entered first, nothing is
    computed or allocated, and the bytes are those that real tensors would have. What a kernel allocates and frees
    within one operation is not seen.

    now, peak: bytes. at_peak: bytes of each category at the (first) peak. A storage's category is the phase in which
    it was made, "activations" outside of any, until it is tagged.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.at_peak: dict[str, int] = {}
        self._category = "activations"
        self._held: Counter[str] = Counter()
        self._live: dict[int, tuple[weakref.ref, int, str]] = {}  # by the address of the storage
        self._hooks: list[RemovableHandle] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._count(result, None)
        elif isinstance(result, list | tuple):
            for value in tree_iter(result):
                if isinstance(value, Tensor):
                    self._count(value, None)
        return result

    def __exit__(self, *exception: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        super().__exit__(*exception)

    def _count(self, tensor: Tensor, category: str | None) -> None:
        """Enter a tensor's storage, or its new size or category; without a category it keeps the one it has."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        reference, old_size, old_category = self._live.get(key, (None, 0, self._category))
        category = category or old_category
        if reference is not None and (size, category) == (old_size, old_category):
            return
        self._live[key] = reference or weakref.ref(storage, partial(self._forget, key)), size, category
        self._held[old_category] -= old_size
        self._held[category] += size
        self.now += size - old_size
        if self.now > self.peak:
            self.peak = self.now
            self.at_peak = {name: held for name, held in self._held.items() if held}

    def _forget(self, key: int, _: object) -> None:
        _, size, category = self._live.pop(key)
        self._held[category] -= size
        self.now -= size

    @property
    def held(self) -> dict[str, int]:
        """Bytes of each category now."""
        return {name: held for name, held in self._held.items() if held}

    def tag(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Put tensors into a category, those made before the tracker was entered too.

        The gradient of a parameter among them follows, from where it is complete; until then it is an activation.
        """
        for tensor in tensors:
            self._count(tensor, category)
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                self._hooks.append(tensor.register_post_accumulate_grad_hook(partial(self._count_gradient, category)))

    def _count_gradient(self, category: str, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._count(parameter.grad, category)

    @contextmanager
    def phase(self, category: str) -> Iterator[None]:
        """Tensors made inside are of this category."""
        outer, self._category = self._category, category
        try:
            yield
        finally:
            self._category = outer


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers of a module."""
    return [*module.parameters(), *module.buffers()]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What an optimizer keeps for each parameter, once it has made a step."""
    return [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
