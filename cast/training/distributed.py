"""One `Accelerator` for one process, many, FSDP2 or DeepSpeed, with nothing left to hidden defaults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    GradScalerKwargs,
    broadcast_object_list,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from cast.ground.graphs import check_device
from cast.ground.processes import computes_on_cpu, join_processes

#: fp32 has no autocast; the others keep fp32 weights.
Precision = Literal["fp32", "bf16", "fp16"]

_NAMES = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def on_main(accelerator: Accelerator, action: Callable[[], Any]) -> Any:
    """Run on the main process; every process gets what it returned, or raises what it raised.

    So a full disk on one ends all of them, instead of leaving the others to wait.
    """
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except (OSError, ValueError) as error:
            outcome[1] = error
    value, failure = broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    return value


def make_accelerator(
    precision: Precision = "fp32",
    accumulate: int = 1,
    micro_batch: int = 1,
    clip_grad: float | None = None,
    trackers: list[str] | None = None,
    directory: str | None = None,
    graphs: bool = False,
) -> Accelerator:
    """The process group, precision and accumulation of a training.

    What `accelerate launch` or `torchrun` put into the environment decides how processes work together; the
    arguments, which come from the recipe, decide the mathematics.

    Args:
        precision: of products; weights and moments stay in fp32 (but see docs/training.md on DeepSpeed).
        accumulate: micro-batches of an optimizer step.
        micro_batch: clips of one of them, which DeepSpeed wants to know.
        clip_grad: greatest length of the gradient, or None.
        trackers: `tensorboard`, `wandb`.
        directory: where trackers write.
        graphs: whether forward and backward are to be replayed as CUDA graphs.

    Raises:
        ValueError: fp16 without a GPU; FSDP1; ZeRO-3; graphs without one, or where processes work together.
    """
    if precision not in _NAMES:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(_NAMES)}")
    if precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("precision fp16 needs a GPU, for its scaled gradients; choose bf16 or fp32")
    _forget_another_precision(_NAMES[precision])
    join_processes()
    accelerator = Accelerator(
        cpu=computes_on_cpu(),
        mixed_precision=_NAMES[precision],
        gradient_accumulation_steps=accumulate,
        log_with=trackers or None,
        project_dir=directory,
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            # The official DeepSpeed configuration: initial_scale_power 7, loss_scale_window 128.
            GradScalerKwargs(init_scale=2.0**7, growth_interval=128),
            # What autocast keeps of one recording must not be found in the next.
            AutocastKwargs(cache_enabled=not graphs),
        ],
    )
    if graphs:
        check_device(accelerator.device)
        if accelerator.distributed_type != "NO":
            raise ValueError(
                f"run.graphs=true works in one process by itself, and this is {accelerator.distributed_type}: "
                "what processes exchange during backward is not recorded. Set run.graphs=false"
            )
    if accelerator.distributed_type == "FSDP":
        _shard(accelerator.state.fsdp_plugin)
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == "DEEPSPEED" else None
    if plugin is not None:
        if plugin.zero_stage > 2:
            raise ValueError("DeepSpeed's ZeRO-3 is not supported: choose stage 1 or 2, or FSDP2 to shard the weights")
        plugin.deepspeed_config.update(deepspeed_settings(accumulate, micro_batch, clip_grad))
    return accelerator


def deepspeed_settings(accumulate: int, micro_batch: int, clip_grad: float | None) -> dict[str, Any]:
    """What a DeepSpeed configuration must say, because the recipe decides it.

    `gradient_clipping` above all: DeepSpeed 0.19.8 clips at 1.0 where nothing is said, unlike the version that the
    published models were trained with.
    """
    return {
        "gradient_accumulation_steps": accumulate,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_clipping": clip_grad or 0.0,
        "zero_allow_untested_optimizer": True,  # AdamW is PyTorch's own, with our groups
    }


def _shard(plugin: Any) -> None:
    """FSDP2 computes as DDP does: autocast alone decides on precision, and gradients are added up in fp32.

    accelerate 1.15 would have FSDP2 round weights, inputs and outputs of each block, and the gradients that processes
    add up, to the precision of the products.

    Raises:
        ValueError: FSDP1, whose weights no checkpoint of ours could hold.
    """
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"FSDP's version {plugin.fsdp_version} is not supported: give accelerate launch --fsdp_version 2"
        )
    plugin.mixed_precision_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)


def _forget_another_precision(name: str) -> None:
    """accelerate keeps one precision for the life of a process; several trainings in one may differ."""
    state = AcceleratorState._shared_state
    if state and state.get("_mixed_precision", name) != name:
        AcceleratorState._reset_state(reset_partial_state=False)
