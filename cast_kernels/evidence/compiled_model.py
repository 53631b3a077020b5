"""torch.compile for comparison: inductor's kernels of the whole model, with the bytes of each.

Inductor itself decides: its graph passes, its choice of recomputation in backward, and its scheduler run on tensors
without memory, up to the generation of code. This gives the fused kernels; the roofline of
:mod:`cast_kernels.evidence.eager_model` gives their costs. Without a GPU the scheduler is the CPU's. A GPU's splits
long reductions, tiles otherwise, and may fuse a little less. Matrix products and attention stay the library's, as by
default on a GPU (no max-autotune).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from cast_kernels.evidence.autocast import cuda_rules
from cast_kernels.evidence.eager_model import Operation
from cast_kernels.evidence.parts import Model, Part, parts

#: Depths of the two compiled models. Their difference is one block, which is then multiplied.
_DEPTHS = (2, 3)


def count(model: Model) -> dict[str, Counter[Operation]]:
    """Phase (`forward`, and `backward` in training) -> number of launches of each kernel in the compiled model.

    Args:
        model: its backend must be eager. Its recompute level has no effect: inductor chooses what to compute again.
    """
    small, large = (_compiled(replace(model, depth=min(depth, model.depth))) for depth in _DEPTHS)
    more = max(model.depth - _DEPTHS[0], 0)
    found = {}
    for phase in small:
        total = Counter(small[phase])
        for operation in small[phase].keys() | large[phase].keys():
            total[operation] += more * (large[phase][operation] - small[phase][operation])
        found[phase] = total
    return found


def _compiled(model: Model) -> dict[str, Counter[Operation]]:
    """The same for a model whose whole depth is compiled."""
    found: dict[str, Counter[Operation]] = {"forward": Counter()}
    if model.training:
        found["backward"] = Counter()
    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True), nullcontext() if model.training else torch.no_grad():
        step, video = _chain(model)
        compiled = torch.compile(step, backend=_backend(found), fullgraph=True)
        with cuda_rules(torch.bfloat16):
            outputs = compiled(video)
        if model.training:
            outputs[0].backward()
    torch._dynamo.reset()
    return found


def _chain(model: Model) -> tuple[Callable[[Tensor], Sequence[Tensor]], Tensor]:
    """The parts as one function of the video, and the video."""
    embedding, *blocks, heads = parts(replace(model, depth=1), "eager")
    for _ in range(model.depth - 1):
        blocks += parts(replace(model, depth=2), "eager")[6:11]

    def step(video: Tensor) -> Sequence[Tensor]:
        spatial, temporal = embedding.call(video)
        for i in range(0, len(blocks), 5):
            spatial, temporal = _block(blocks[i : i + 5], spatial, temporal)
        outputs = heads.call(spatial, temporal)
        if heads.loss is None:
            return outputs
        with torch.autocast("cpu", enabled=False):
            return heads.loss(*outputs)

    return step, embedding.inputs[0]


def _block(block: Sequence[Part], spatial: Tensor, temporal: Tensor) -> tuple[Tensor, Tensor]:
    attend_spatial, attend_temporal, exchange, ffn_spatial, ffn_temporal = (part.call for part in block)
    spatial, temporal = exchange(attend_spatial(spatial)[0], attend_temporal(temporal)[0])
    return ffn_spatial(spatial)[0], ffn_temporal(temporal)[0]


def _backend(found: dict[str, Counter[Operation]]) -> Any:
    from torch._inductor.compile_fx import compile_fx

    return functools.partial(compile_fx, inner_compile=functools.partial(_schedule, found))


def _schedule(found: dict[str, Counter[Operation]], module: Any, _inputs: Any, **options: Any) -> Any:
    """Inductor's own `inner_compile` without the generation of code. Uses inductor's internal names."""
    from torch._inductor.compile_fx import (
        _recursive_post_grad_passes,
        make_boxed_func,
        record_original_output_strides,
    )
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    given = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    mode = next(value.fake_mode for value in given if isinstance(value, FakeTensor))
    backward = bool(options.get("is_backward"))
    with V.set_fake_mode(mode), DebugContext():
        record_original_output_strides(module)
        _recursive_post_grad_passes(module, is_inference=bool(options.get("is_inference")))
        graph = GraphLowering(module, example_inputs=given, is_backward=backward)
        with V.set_graph_handler(graph):
            graph.run(*given)
            graph._update_scheduler()
            operations = [_operation(node) for node in graph.scheduler.nodes]
    found["backward" if backward else "forward"].update(o for o in operations if o.bytes)
    return make_boxed_func(module.forward)


def _operation(node: Any) -> Operation:
    library = getattr(node.node, "python_kernel_name", None) or "" if node.is_extern() else ""
    name = library.replace("extern_kernels.", "aten.") or "fused"
    moved = int(node.get_read_write_buffers_sizes())
    if "scaled_dot_product" in name:
        shapes = [x.get_size() for x in node.node.inputs]
        flops = sdpa_backward_flop_count(*shapes[:4]) if "backward" in name else sdpa_flop_count(*shapes[:3])
        return Operation(name, int(flops), moved)
    return Operation(name, int(node.estimate_flops() or 0) if library else 0, moved)
