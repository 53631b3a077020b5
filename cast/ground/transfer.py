"""Copies to the GPU: the host waits for no copy, and the next copy overlaps with computing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device; from the CPU to a GPU through pinned memory, without a wait.

    PyTorch keeps the pinned memory until the copy is done, so the caller may drop the tensor at once.
    """
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Ahead(Generic[Item]):
    """Prepares at most one item ahead; on a GPU on its own stream, in parallel to other work.

    Args:
        items: the items to prepare, in order.
        prepare: item -> tensors by name, on `device`. It may wait for its own stream, not for others.
        device: where the tensors go.
    """

    def __init__(
        self, items: Iterable[Item], prepare: Callable[[Item], Mapping[str, Tensor]], device: torch.device
    ) -> None:
        self._items, self._prepare, self._device = iter(items), prepare, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._held: tuple[Item, Mapping[str, Tensor]] | Exception | None = None

    def __iter__(self) -> Iterator[tuple[Item, Mapping[str, Tensor]]]:
        return self

    def start(self) -> None:
        """Prepare the next item, unless it is prepared. An error is raised later, when the item is asked for.

        The host waits until the item is ready. Call this while the GPU has work.
        """
        if self._held is not None:
            return
        try:
            with self._on_stream():
                item = next(self._items)
                self._held = item, self._prepare(item)
        except Exception as error:  # StopIteration too
            self._held = error

    def __next__(self) -> tuple[Item, Mapping[str, Tensor]]:
        self.start()
        held, self._held = self._held, None
        assert held is not None
        if isinstance(held, Exception):
            raise held
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in held[1].values():
                tensor.record_stream(current)  # the allocator keeps the memory until this stream is done with it
        return held

    def _on_stream(self) -> AbstractContextManager[None]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
