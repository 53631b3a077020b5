"""CUDA graphs on the CPU: what PyTorch does while a graph is recorded is noted, operator by operator, and done again.

A replay runs no Python of the recorded function: it reads and writes the very tensors of the recording, as a graph
reads and writes addresses. After the recording everything that it computed is overwritten, since a real one computes
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Notes(TorchDispatchMode):
    """Every operator with its arguments and its results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ == "_local_scalar_dense":
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **kwargs)
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [
            x if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given else None
            for x in tree_leaves(result)
        ]
        self.calls.append((func, args, kwargs, made))
        return result


class CUDAGraph:
    """Stands for torch.cuda.CUDAGraph."""

    replays = 0

    def __init__(self) -> None:
        self.notes = Notes()

    def scribble(self) -> None:
        with torch.no_grad():
            for *_, made in self.notes.calls:
                for x in made:
                    if x is not None:
                        x.fill_(float("nan") if x.is_floating_point() else 1)

    def replay(self) -> None:
        CUDAGraph.replays += 1
        with torch.no_grad(), torch._C._DisableAutocast():
            for func, args, kwargs, made in self.notes.calls:
                for kept, new in zip(made, tree_leaves(func(*args, **kwargs)), strict=True):
                    if kept is not None:
                        kept.copy_(new)


class Stream:
    """Stands for torch.cuda.Stream: the CPU does one thing after the other anyway."""

    def __init__(self, device: Any = None) -> None: ...

    def wait_stream(self, other: Any) -> None: ...


@contextmanager
def graph(made: CUDAGraph, **options: Any) -> Iterator[None]:
    """Stands for torch.cuda.graph."""
    assert options.keys() == {"pool", "stream", "capture_error_mode"}
    CUDAGraph.recordings.append(made)  # type: ignore[attr-defined]
    with made.notes:
        yield
    made.scribble()


@contextmanager
def graphs_on_cpu() -> Iterator[list[CUDAGraph]]:
    """Inside, `cast.ground.graphs` records and replays on the CPU; gives the recordings."""
    CUDAGraph.recordings, CUDAGraph.replays = [], 0  # type: ignore[attr-defined]
    with (
        mock.patch("cast.ground.graphs.check_device"),
        mock.patch("torch.cuda.graph", graph),
        mock.patch("torch.cuda.CUDAGraph", CUDAGraph),
        mock.patch("torch.cuda.Stream", Stream),
        mock.patch("torch.cuda.stream", side_effect=lambda _: nullcontext()),
        mock.patch("torch.cuda.current_stream", return_value=Stream()),
        mock.patch("torch.cuda.graph_pool_handle", return_value=(0, 1)),
    ):
        yield CUDAGraph.recordings  # type: ignore[attr-defined]
