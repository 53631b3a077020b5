"""Decides whether an op may read a layer's weights instead of calling the layer. No other module decides this.

An op computes the result of several layers from their weights. This is right only if a call of each layer would do no
more than its class does with plain weights. An op must not read a layer that was replaced (LoRA, quantised, compiled),
a layer with a hook or its own `forward` on the instance (offloading), or a weight that is sparse or a tensor subclass.
Such a layer must be called. A parametrization computes its weights as attributes, so an op may read them.

A module asks :func:`obstacle` at each call. If there is one, it says so with :func:`announce` and calls its layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as _module
from torch.utils.module_tracker import ModuleTracker

from cast_kernels.compiling import constant
from cast_kernels.problem import BackendError

#: Types of plain weights. Compilers replace the first two by the last two.
_TENSORS = frozenset((Tensor, nn.Parameter, FakeTensor, FunctionalTensor))

#: Hooks on every module of the process; torch changes these mappings in place.
_GLOBAL_HOOKS: tuple[Mapping[int, Any], ...] = (
    _module._global_forward_hooks,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)


def _calls(kind: type[nn.Module]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The methods that call `forward` of a class's modules."""
    return kind.__call__, kind._call_impl


#: PyTorch's own. A tool that replaces one of them wants to see every layer.
_CALLS = _calls(nn.Module)


class Reading(NamedTuple):
    """The attributes that an op reads of a module, and the `forward` that the module must have.

    A module keeps it as its attribute `reading`; those of linear layers and norms are in this file.
    """

    forward: Callable[..., Any]
    tensors: tuple[str, ...] = ()  # attributes that the op reads
    absent: tuple[str, ...] = ()  # attributes that must be None, because the op does not read them
    settings: tuple[str, ...] = ()  # attributes that determine the tensors and their order
    layers: Mapping[str, Reading | None] = {}  # submodules; None: their own `reading`


LINEAR = Reading(nn.Linear.forward, ("weight", "bias"))
#: A linear layer without a bias of its own.
BARE_LINEAR = Reading(nn.Linear.forward, ("weight",), absent=("bias",))
NORM = Reading(nn.LayerNorm.forward, ("weight", "bias"))


def obstacle(name: str, module: nn.Module | None, reading: Reading | None = None) -> str:
    """Why an op may not read a module's weights, "" if it may.

    Args:
        name: the module's name in the answer.
        module: checked with the submodules that `reading` names; global hooks are not checked.
        reading: the op's reading of it; None: the module's own.

    Returns:
        A clause that begins with the name of the layer that must be called: "attention.qkv has a forward hook".
    """
    if module is None:
        return f"{name} is None"
    kind = type(module)
    reading = reading or getattr(module, "reading", None)
    # Attributes, not `__dict__`: torch.compile guards on attributes, so it notices a later hook.
    if reading is None or kind.forward is not reading.forward or _calls(kind) != _calls(nn.Module):
        return f"{name} is a {kind.__module__}.{kind.__qualname__}, which computes in a way of its own"
    if "forward" in module.__dict__ or "_call_impl" in module.__dict__:
        return f"{name} has a forward of its own on the instance, as offloading sets it"
    if module._forward_hooks or module._forward_pre_hooks:
        return f"{name} has a forward hook"
    if module._backward_hooks or module._backward_pre_hooks:
        return f"{name} has a backward hook"
    own = module._parameters
    for field in reading.tensors:
        tensor: Any = own.get(field)
        if type(tensor) not in _TENSORS:
            tensor = getattr(module, field, None)  # a parametrization's, or a view into FSDP's flat parameter
            if tensor is None:
                return f"{name} has no {field}"
            if type(tensor) not in _TENSORS:
                return f"{name}.{field} is a {type(tensor).__qualname__}"
        if tensor.layout is not torch.strided:
            return f"{name}.{field} is laid out as {tensor.layout}"
    for field in reading.absent:
        if own.get(field) is not None or getattr(module, field, None) is not None:
            return f"{name} has a {field}, which the op does not read"
    inside = obstacle_among(module, reading.layers)
    return f"{name}.{inside}" if inside else ""


def obstacle_among(module: nn.Module, layers: Mapping[str, Reading | None]) -> str:
    """The same for submodules, by name, of a module that is itself called."""
    children = module._modules
    for name, reading in layers.items():
        found = obstacle(name, children.get(name), reading)
        if found:
            return found
    return ""


class Glance:
    """Reads all tensors of some layers for an op, in one quick pass over layers that :func:`obstacle` found plain.

    It knows the layers' classes and repeats each check of :func:`obstacle` at each call. If one fails, :func:`obstacle`
    must decide. It takes 14 us for B-CAST's fourteen layers; :func:`obstacle` takes 21 and reading the attributes 34
    (Zen 4).
    """

    def __init__(
        self, children: Mapping[str, nn.Module | None], layers: Mapping[str, Reading | None],
        order: Sequence[str | None] | None = None,
    ) -> None:  # fmt: skip
        """Prepare to read `layers` of `children`, which are plain now.

        Args:
            children: modules by name.
            layers: their readings, as in :func:`obstacle_among`.
            order: dotted names of the tensors in the order of :meth:`read`'s result, None for None. If it is None: the
                readings' order.
        """
        self._steps: list[_Step] = []
        self._kinds: dict[type[nn.Module], Callable[..., Any]] = {}
        names: list[str | None] = []
        waiting = [(0, "", children, layers)]
        for parent, path, modules, readings in waiting:
            for name, given in readings.items():
                module: Any = modules[name]
                reading: Reading = given or module.reading
                settings = [(key, module.__dict__[key]) for key in reading.settings]
                own = None if given else module.__dict__.get("reading")
                step = _Step(parent, name, type(module), reading.tensors, reading.absent, own, settings)
                self._steps.append(step)
                self._kinds[type(module)] = reading.forward
                names += [f"{path}{name}.{field}" for field in reading.tensors]
                waiting.append((len(self._steps), f"{path}{name}.", module._modules, reading.layers))
        indices = range(len(names)) if order is None else [-1 if name is None else names.index(name) for name in order]
        self._arranged = itemgetter(*indices)

    def read(self, children: Mapping[str, nn.Module | None]) -> tuple[Any, ...] | None:
        """The tensors, or None: then :func:`obstacle` must decide."""
        if nn.Module.__call__ is not _CALLS[0] or nn.Module._call_impl is not _CALLS[1] or any(_GLOBAL_HOOKS):
            return None
        for kind, forward in self._kinds.items():
            if kind.forward is not forward or _calls(kind) != _CALLS:
                return None
        modules, found = [children], []
        try:
            for parent, name, kind, tensors, absent, reading, settings in self._steps:
                module = modules[parent][name]
                if type(module) is not kind:
                    return None
                own = module.__dict__
                if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own or "_call_impl" in own:
                    return None
                if own["_backward_hooks"] or own["_backward_pre_hooks"] or own.get("reading") is not reading:
                    return None
                parameters = own["_parameters"]
                for field in tensors:
                    tensor = parameters[field]
                    if type(tensor) not in _TENSORS or tensor.layout is not torch.strided or field in own:
                        return None
                    found.append(tensor)
                for field in absent:
                    if parameters[field] is not None or field in own:
                        return None
                for key, value in settings:
                    if own[key] != value:
                        return None
                modules.append(own["_modules"])
        except KeyError:  # a layer or a parameter was removed or moved
            return None
        found.append(None)
        return self._arranged(found)


class _Step(NamedTuple):
    """One layer of a :class:`Glance`."""

    parent: int  # 0: among the given modules; n: inside the layer of step n - 1
    name: str
    kind: type[nn.Module]
    tensors: tuple[str, ...]
    absent: tuple[str, ...]
    reading: Reading | None  # the instance's own attribute
    settings: list[tuple[str, Any]]


#: Owner -> the glance at its layers.
_GLANCES: WeakKeyDictionary[nn.Module, Glance] = WeakKeyDictionary()


def at_a_glance(owner: nn.Module | None, children: Mapping[str, nn.Module | None]) -> tuple[Any, ...] | None:
    """The tensors of layers that :func:`found_plain` remembers, or None: ask :func:`obstacle`. Compilers get None."""
    if owner is None or torch.compiler.is_compiling():
        return None
    known = _GLANCES.get(owner)
    return None if known is None else known.read(children)


def found_plain(
    owner: nn.Module, children: Mapping[str, nn.Module | None], layers: Mapping[str, Reading | None],
    order: Sequence[str | None] | None = None,
) -> None:  # fmt: skip
    """Remember layers without an obstacle, so that :func:`at_a_glance` can read them. Arguments as for :class:`Glance`.

    A glance cannot read a computed attribute, such as a parametrization's; then nothing is remembered.
    """
    if torch.compiler.is_compiling():
        return
    try:
        known: Glance | None = Glance(children, layers, order)
    except (KeyError, ValueError):  # a computed setting, or a table that is the sum of two
        known = None
    if known is None or known.read(children) is None:
        _GLANCES.pop(owner, None)
    else:
        _GLANCES[owner] = known


def global_obstacle() -> str:
    """A clause that names a global hook or a patch on every module of the process, "" if there is none.

    Hooks of PyTorch's ModuleTracker do not count: FlopCounterMode uses them to know the current module, and they change
    nothing.
    """
    calls = _calls(nn.Module)
    if calls != _CALLS and not all(map(_is_of_torch, calls)):
        return "torch.nn.Module.__call__ or _call_impl was replaced, for every module"
    if not any(_GLOBAL_HOOKS):
        return ""
    hooks = [hook for hooks in _GLOBAL_HOOKS for hook in hooks.values()]
    if all(isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks):
        return ""
    return "a global hook is on every module"


def _is_of_torch(call: Callable[..., Any]) -> bool:
    """Whether PyTorch defines it. While `torch.export` traces, its wrapper is there, and it sees ops as operators."""
    return getattr(call, "__globals__", {}).get("__name__", "").startswith("torch.")


def announce(what: str, backend: str, found: str, owner: nn.Module) -> None:
    """Say that `what` runs by its modules in PyTorch. Under "auto" this is one warning for each owner and reason.

    Backend "eager" is PyTorch either way and says nothing.

    Args:
        what: the op, in words.
        backend: the name that the caller gave.
        found: the answer of :func:`obstacle`.
        owner: the module whose warnings are counted.

    Raises:
        BackendError: the caller named a kernel backend.
    """
    if backend == "eager":
        return
    text = verdict(what, backend, found)
    if backend != "auto":
        raise BackendError(text)
    if torch.compiler.is_compiling():
        _warn(text)
    elif _WARNED.get(owner) != found:
        _WARNED[owner] = found
        _warn(text)


def verdict(what: str, backend: str, found: str) -> str:
    """A sentence for an op with a layer that must be called."""
    if backend in ("auto", "eager"):
        return f"{what} runs by its modules in PyTorch, not fused, with the same mathematics: {found}"
    return (
        f"backend={backend!r} cannot run {what}: it reads weights and calls no layer, but {found}. Use backend='auto' "
        "or 'eager', which then call the layers, or put the plain layer back (merge the adapter, remove the hook)."
    )


#: Owner -> the reason of the last warning.
_WARNED: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


@constant
def _warn(text: str) -> bool:
    """Warn; under torch.compile once, at tracing. A function that is marked constant must return a value."""
    warnings.warn(text, stacklevel=3)
    return True
