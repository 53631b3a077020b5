"""One of several processes of a training: `sharded_process.py MODE OUT [override ...]`.

MODE is `ddp`, `fsdp2`, `zero1` or `zero2`. accelerate turns to FSDP2 and DeepSpeed on GPUs only; here its state is told
to, so that its own code for them runs on gloo.
"""

from __future__ import annotations

import sys
from typing import Any

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType

import cast.training.distributed as room
from cast.training.command import fit
from cast.training.recipes import load_recipe
from cast.training.settings import TrainSettings


class FSDP2(Accelerator):
    version = 2

    def __init__(self, **options: Any) -> None:
        from accelerate.utils import FullyShardedDataParallelPlugin

        super().__init__(**options)
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=self.version,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["CASTBlock"],
        )
        if self.mixed_precision != "no":  # as accelerate does where it turns to FSDP by itself
            self.state.fsdp_plugin.set_mixed_precision(self.mixed_precision)
        _tell(self, DistributedType.FSDP)


class ZeRO(Accelerator):
    stage = 1

    def __init__(self, **options: Any) -> None:
        from accelerate.utils import DeepSpeedPlugin

        super().__init__(**options)
        plugin = DeepSpeedPlugin(zero_stage=self.stage, gradient_accumulation_steps=self.gradient_accumulation_steps)
        plugin.set_mixed_precision("no")
        plugin.select(_from_accelerator_state=True)
        self.state.deepspeed_plugins = plugin
        self.deepspeed_engine_wrapped = None
        _tell(self, DistributedType.DEEPSPEED)


class ZeRO2(ZeRO):
    stage = 2


def _tell(accelerator: Accelerator, kind: DistributedType) -> None:
    accelerator.state.distributed_type = kind
    PartialState._shared_state["distributed_type"] = kind


def run(mode: str, out: str, *overrides: str) -> None:
    """Train as one of the processes that the environment speaks of."""
    kinds: dict[str, Any] = {"ddp": Accelerator, "fsdp2": FSDP2, "zero1": ZeRO, "zero2": ZeRO2}
    room.Accelerator = kinds[mode]  # type: ignore[misc]
    fit(load_recipe(TrainSettings, "digits", f"out={out}", *overrides), resume=True)


if __name__ == "__main__":
    run(*sys.argv[1:])
    # A process that leaves with its group open may abort: "terminate called without an active exception".
    PartialState().destroy_process_group()
