"""Modules and streams on a GPU that is not there, for tests of what only shapes, dtypes and devices decide."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef

import cast_kernels


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Tensors made inside are fake and may be on `cuda`; attention is flash attention, as on an A100."""

    def flash(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        if torch.is_autocast_enabled("cuda"):
            q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", flash),
    ):
        yield


@contextmanager
def gpu_autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """CUDA's autocast rules; `torch.autocast("cuda")` itself turns off where there is no GPU."""
    if dtype is None:
        yield
        return
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def module_and_streams(
    dtype: torch.dtype = torch.float32, batch: int = 1, **arguments: Any
) -> tuple[cast_kernels.BCAST, Tensor, Tensor]:
    """A module and its two streams on cuda, of the paper's size unless `arguments` say otherwise. Inside `fake_gpu`."""
    with unset_fake_temporarily(), torch.device("meta"):
        module = cast_kernels.BCAST(**arguments).to(dtype)
    module = module.to_empty(device="cuda")
    shape = (batch, module.num_frames, module.num_patches, module.dim)
    temporal = torch.empty(shape, dtype=dtype, device="cuda", requires_grad=True)
    spatial = torch.empty((*shape[:2], shape[2] + 1, shape[3]), dtype=dtype, device="cuda", requires_grad=True)
    return module, spatial, temporal


def kept_mib(backend: str, recompute: str, dtype: torch.dtype, autocast: torch.dtype | None = None) -> float:
    """MiB that autograd keeps of one clip at the paper's size, besides the streams and the parameters."""
    with fake_gpu():
        module, spatial, temporal = module_and_streams(dtype, backend=backend, recompute=recompute)
        given = {StorageWeakRef(x.untyped_storage()) for x in (spatial, temporal, *module.parameters())}
        kept: dict[StorageWeakRef, int] = {}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if StorageWeakRef(storage) not in given:
                kept[StorageWeakRef(storage)] = storage.nbytes()
            return x

        with gpu_autocast(autocast), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            outputs = module(spatial, temporal)
        assert [x.dtype for x in outputs] == [dtype, dtype]
        return sum(kept.values()) / 2**20
