"""The `Accelerator` of a training, for one process, many, FSDP2 or DeepSpeed, without hidden defaults."""

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

#: fp32 runs without autocast; with the others, weights stay in fp32.
Precision = Literal["fp32", "bf16", "fp16"]

_NAMES = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def on_main(accelerator: Accelerator, action: Callable[[], Any]) -> Any:
    """Run on the main process; every process gets its result, or raises its error.

    So a full disk on one machine ends all processes, and none waits forever.
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

    The environment, set by `accelerate launch` or `torchrun`, decides how processes work together. The arguments come
    from the recipe and decide the mathematics.

    Args:
        precision: of products; weights and moments stay in fp32 (but see docs/training.md on DeepSpeed).
        accumulate: micro-batches of an optimizer step.
        micro_batch: clips of a micro-batch; DeepSpeed needs it.
        clip_grad: greatest length of the gradient, or None.
        trackers: `tensorboard`, `wandb`.
        directory: where trackers write.
        graphs: whether forward and backward will be replayed as CUDA graphs.

    Raises:
        ValueError: fp16 without a GPU; FSDP1; ZeRO-3; graphs on a CPU, or with several processes.
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
            # Autocast's cache of one recording must not be used in the next.
            AutocastKwargs(cache_enabled=not graphs),
        ],
    )
    if graphs:
        check_device(accelerator.device)
        if accelerator.distributed_type != "NO":
            raise ValueError(
                f"run.graphs=true works in one process by itself, and this is {accelerator.distributed_type}: "
                "a graph does not record what processes exchange during backward. Set run.graphs=false"
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
    """The entries of a DeepSpeed configuration that the recipe decides.

    `gradient_clipping` matters most: without an entry, DeepSpeed 0.19.8 clips at 1.0; the version that trained the
    published models did not clip.
    """
    return {
        "gradient_accumulation_steps": accumulate,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_clipping": clip_grad or 0.0,
        "zero_allow_untested_optimizer": True,  # AdamW is PyTorch's, with our groups
    }


def _shard(plugin: Any) -> None:
    """Make FSDP2 compute as DDP does: only autocast decides on precision, and gradients are added in fp32.

    By default accelerate 1.15 makes FSDP2 round to the precision of products: weights, inputs and outputs of each
    block, and the gradients that processes add.

    Raises:
        ValueError: FSDP1; our checkpoints cannot hold its weights.
    """
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"FSDP's version {plugin.fsdp_version} is not supported: give accelerate launch --fsdp_version 2"
        )
    plugin.mixed_precision_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)


def _forget_another_precision(name: str) -> None:
    """Reset accelerate's precision. It keeps one for the life of a process, but several trainings in it may differ."""
    state = AcceleratorState._shared_state
    if state and state.get("_mixed_precision", name) != name:
        AcceleratorState._reset_state(reset_partial_state=False)
