"""Packed copies of weights, kept between calls that need no gradient.

Packing costs a few percent of a call and gives the same bits every time, so an inference call keeps its result. A copy
serves as long as every weight is the same memory in the same version; it goes when the first weight dies, when a
weight is found changed, or when a call that will be differentiated comes: then the weights are about to change.

PyTorch's version counter sees in-place operators, optimizers and `load_state_dict`. It does not see writes through
`tensor.data` or through a NumPy view: after those, call :func:`clear`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

_LOCK = threading.Lock()
_KEPT: Any = WeakTensorKeyDictionary()


def for_call(weights: Sequence[Tensor | None], bf16: bool, trains: bool, pack: Callable[[], Tensor]) -> Tensor | None:
    """Packed weights for a call. If it `trains`: none, and those that are kept go; else as :func:`get` finds them."""
    present = [w for w in weights if w is not None]
    if not trains:
        return get(present, bf16, pack)
    with _LOCK:
        _KEPT.pop(present[0], None)
    return None


def get(weights: Sequence[Tensor], bf16: bool, pack: Callable[[], Tensor]) -> Tensor:
    """The packed form of `weights`: the one kept from an earlier call if it still holds, else what `pack` returns.

    Args:
        weights: all that go into it; the copy lives no longer than the first.
        bf16: whether it may hold them rounded to bfloat16.
        pack: makes it.
    """
    if any(w.is_inference() for w in weights):  # they have no version to go by
        return pack()
    state = (bf16, [(w.data_ptr(), w._version, w.shape, w.stride()) for w in weights])
    with _LOCK:
        found = _KEPT.get(weights[0])
    # The same objects too: a new tensor may lie where an old one died, in the same version.
    if found and found[0] == state and all(ref() is w for ref, w in zip(found[1], weights, strict=True)):
        return found[2]
    packed = pack()
    with _LOCK:
        _KEPT[weights[0]] = (state, [TensorWeakRef(w) for w in weights], packed)
    return packed


def clear() -> None:
    """Forget everything that is packed."""
    with _LOCK:
        _KEPT.clear()


def kept_bytes() -> int:
    """Bytes of all packed copies alive."""
    with _LOCK:
        return sum(packed.nbytes for *_, packed in _KEPT.values())
