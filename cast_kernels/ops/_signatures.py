"""Remembers checked calls. A call that is like an earlier one would pass the same checks, so it is not checked again.

Two calls are alike if their other arguments are equal, and their tensors agree in Python type, dtype, device, shape,
`requires_grad` and their treatment by PyTorch's dispatcher on this thread: autocast, inference mode, functional
transforms, dispatch modes, tracing, lazy negation. `TensorGuards` of PyTorch's compiler compares all of that in C++:
1.7 us for thirty tensors, where Python takes 19. Values and strides may differ: no check of an op reads them. Nothing
here holds a tensor.

`TensorGuards` and the functions that :func:`unobserved` calls are not public. If this PyTorch lacks one, or one answers
wrongly, every call is checked and goes through PyTorch's dispatcher (:data:`FAULT`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

Answer = TypeVar("Answer")

#: Most lists of tensors remembered for equal other arguments, and most such arguments of an op.
MOST_LISTS, MOST_ARGUMENTS = 16, 64


#: Most tensors of a call.
_MOST_TENSORS = 48


class _Absent(Tensor):
    """The type of the placeholders of :func:`listed`; no tensor of a caller has it."""


#: One for each place in a list: to guards a list with one tensor twice is another list.
_ABSENT = tuple(torch.empty(0, device="cpu").as_subclass(_Absent) for _ in range(_MOST_TENSORS))


def listed(*tensors: Tensor | None) -> list[Tensor]:
    """The tensors, with a placeholder for each None."""
    return [absent if x is None else x for x, absent in zip(tensors, _ABSENT[: len(tensors)], strict=True)]


class Alike(Generic[Answer]):
    """Answers for lists of tensors. A list finds the answer of a list like it; the newest :data:`MOST_LISTS` are
    kept."""

    def __init__(self) -> None:
        self._known: tuple[tuple[Any, Answer], ...] = ()  # replaced as a whole: other threads read it

    def find(self, tensors: Sequence[Tensor]) -> Answer | None:
        for guards, answer in self._known:
            if guards.check(*tensors):
                return answer
        return None

    def add(self, tensors: Sequence[Tensor], answer: Answer) -> None:
        """Remember the answer, unless the list holds a tensor twice: such lists are never alike.

        The tensors are :func:`listed` and :func:`unobserved`.
        """
        if len({id(x) for x in tensors}) < len(tensors):
            return
        self._known = ((_guards(tensors), answer), *self._known[: MOST_LISTS - 1])

    def __len__(self) -> int:
        return len(self._known)


class Signatures(Generic[Answer]):
    """:class:`Alike` for each value of the other arguments; the newest :data:`MOST_ARGUMENTS` are kept."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Alike[Answer]] = {}

    def find(self, arguments: Hashable, tensors: Sequence[Tensor]) -> Answer | None:
        try:
            known = self._known.get(arguments)
        except TypeError:  # arguments that cannot be hashed: checked at every call
            return None
        return None if known is None else known.find(tensors)

    def add(self, arguments: Hashable, tensors: Sequence[Tensor], answer: Answer) -> None:
        """Remember the answer, unless the arguments cannot be hashed. Tensors as in :meth:`Alike.add`."""
        try:
            known = self._known.setdefault(arguments, Alike())
        except TypeError:
            return
        known.add(tensors, answer)
        while len(self._known) > MOST_ARGUMENTS:
            self._known.pop(next(iter(self._known)), None)

    def __len__(self) -> int:
        return sum(map(len, tuple(self._known.values())))


def _guards(tensors: Sequence[Tensor]) -> Any:
    """A test whether other tensors are like these."""
    from torch._C._dynamo.guards import TensorGuards

    sizes: Any = [list(x.shape) for x in tensors]
    strides: Any = [[None] * x.ndim for x in tensors]  # any
    return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)


def watched() -> bool:
    """Whether an observer of operators is active that guards do not know: a profiler, a function mode, tangents."""
    return (
        bool(FAULT)
        or torch._C._autograd._profiler_enabled()
        or torch._C._len_torch_function_stack() > 0
        or forward_ad._current_level >= 0
    )


def unobserved(tensors: Sequence[Tensor]) -> bool:
    """Whether only autograd stands between an operator and its kernel, so that a call of the kernel has the same
    effect.

    This holds if every tensor is plain memory on the CPU or a GPU, and no mode, transform or tracer is active.
    """
    if watched() or torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    keys = torch._C.DispatchKey
    usual = torch._C.DispatchKeySet(keys.BackendSelect) | torch._C.DispatchKeySet(keys.ADInplaceOrView)
    if (torch._C._dispatch_tls_local_include_set() - usual).raw_repr():
        return False
    below = torch._C._dispatch_tls_local_exclude_set().has(keys.AutogradFunctionality)
    if below and torch.is_grad_enabled():  # in another operator's kernel: its derivative covers this call
        return False
    plain = {device: _plain_keys(device) for device in {x.device for x in tensors}}
    return all(
        type(x) is _Absent
        or (type(x) in (Tensor, nn.Parameter) and torch._C._dispatch_keys(x).raw_repr() in plain[x.device])
        for x in tensors
    )


def _plain_keys(device: torch.device) -> set[int]:
    """The dispatch keys of plain memory on the device, made with inference mode on or off."""
    if device.type not in ("cpu", "cuda"):
        return set()
    found = set()
    for mode in (False, True):
        with torch.inference_mode(mode):
            found.add(torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr())
    return found


def find_fault() -> str:
    """The first missing or wrong one of PyTorch's inner functions that this file needs; "" if all are right."""

    def made(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cpu", requires_grad=grad)

    try:
        forward_ad._current_level + 0
        torch._C._autograd._profiler_enabled(), torch._C._len_torch_function_stack()
        torch._C._AutoDispatchBelowAutograd  # noqa: B018
        unobserved([made(2)])
        guards = _guards([made(2, 3), made(4)])
        answers = [
            guards.check(*tensors)
            for tensors in (
                (made(2, 3), made(4)), (made(3, 2).t(), made(4)), (made(2, 3), made(5)), (made(4), made(2, 3)),
                (made(2, 3, dtype=torch.float16), made(4)), (made(2, 3, grad=True), made(4)),
            )
        ]  # fmt: skip
    except Exception as error:  # a function with another signature may raise anything
        return f"{type(error).__name__}: {error}"
    return "" if answers == [True, True, False, False, False, False] else f"TensorGuards answers {answers}"


def describe() -> str:
    """The treatment of repeated calls in this process, in words."""
    if not FAULT:
        return "a call like an earlier one is not checked again"
    return (
        f"every call is checked and goes through PyTorch's dispatcher, which takes longer on the host: PyTorch "
        f"{torch.__version__} has other inner functions than those that know a call again ({FAULT})"
    )


#: Why this process remembers no call; usually "".
FAULT = ""
FAULT = find_fault()
