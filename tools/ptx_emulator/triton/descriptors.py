"""Tensor descriptors that the host makes: what a kernel takes for one, as Triton's launcher expands it.

From sm_90 on a kernel takes a tensor map of 128 bytes, of which the compiled kernel's metadata says swizzle, element
and box, and then shape and strides. Below it takes the address, shape, strides and how to fill in numbers of their own,
and shape and strides again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ptx_emulator.core.tensor_maps import SWIZZLES, TYPES, TensorMap

try:
    from triton.backends.driver import decompose_descriptor
except ImportError:  # before Triton 3.8 each backend expands them in a way of its own
    decompose_descriptor = None

#: What an expanded argument's type is called where the kernel takes a map.
MAP_TYPE = "nvTmaDesc"


class HostMap(NamedTuple):
    """A tensor map whose address is not known yet: a tensor, and the numbers of the map, innermost dimension first."""

    base: torch.Tensor
    type: str
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # bytes, of each dimension but the innermost
    box: tuple[int, ...]
    swizzle: int
    fill: str

    def at(self, address: int) -> TensorMap:
        """The map of the tensor at this address.

        Raises:
            ValueError: CUDA's driver would refuse it.
        """
        return TensorMap(address, self.type, self.sizes, self.strides, self.box, self.swizzle, self.fill)


def is_descriptor(kind: Any) -> bool:
    """Whether Triton's type of an argument is a descriptor's."""
    return isinstance(kind, str) and kind.startswith("tensordesc")


def obstacle(kind: str, meta: Sequence[Mapping[str, Any]] | None) -> str:
    """Why descriptors of this kernel cannot be expanded, "" if they can.

    Args:
        kind: Triton's type of one of its descriptors.
        meta: what the compiled kernel says of all of them; nothing below sm_90.
    """
    if decompose_descriptor is None:
        return "this Triton expands them in a way of its own: 3.8 or newer is needed"
    if kind.startswith("tensordesc_im2col"):
        return "im2col is not emulated"
    if any(one["fp4_padded"] or one.get("is_im2col", False) for one in meta or ()):
        return "fp4 and im2col are not emulated"
    return ""


def expand(kind: str, value: Any, meta: Mapping[str, Any] | None) -> Iterator[tuple[str, str, Any]]:
    """(what it is, Triton's type, value) of each argument that the kernel takes for a descriptor.

    Args:
        kind: Triton's type of the descriptor, "tensordesc<bf16[16, 64]>".
        value: Triton's or Gluon's TensorDescriptor.
        meta: what the compiled kernel says of this one; None: it takes no map.
    """
    rank = len(value.shape)
    places = [*(f"shape.{i}" for i in range(rank)), *(f"strides.{i}" for i in range(rank))]
    again = ["i32"] * rank + ["i64"] * rank
    if meta is None:
        names = ["base", *places, "nan", "tf32", *places]
        kinds = [f"*{kind.split('<')[1].split('[')[0]}", *["i64"] * (2 * rank), "i1", "i1", *again]
        yield from zip(names, kinds, decompose_descriptor(value), strict=True)
        return
    yield "map", MAP_TYPE, _map(value, meta)
    yield from zip(places, again, (*value.shape, *value.strides), strict=True)


def _map(value: Any, meta: Mapping[str, Any]) -> HostMap:
    bytes_of_one = int(meta["elem_size"])
    return HostMap(
        value.base,
        "tf32" if value.round_f32_to_tf32 else TYPES[meta["elem_type"]],
        tuple(value.shape[::-1]),
        tuple(stride * bytes_of_one for stride in value.strides[-2::-1]),
        tuple(meta["block_size"][::-1]),
        SWIZZLES[meta["swizzle"]],
        value.padding,
    )
