"""Compiles what later tests launch, beside the first ones: a process that `conftest` starts where no other shares them.

It launches what they do and runs nothing. A test that comes before its kernels are there compiles them itself.
"""

from kernel_cache import offline
from ptx_emulator.targets import target
from ptx_emulator.triton.driver import Recorder
from test_emulated_training import FAST, tiny_model, train_step

from cast_kernels.evidence.cases import KINDS, run
from cast_kernels.evidence.problems import SIZES

if __name__ == "__main__":
    with offline(target("sm_90"), Recorder()):
        run(SIZES["small"][0], "triton", **KINDS["bf16"]._asdict())
    for name, dtype, autocast in reversed(FAST):  # from the end, where no test is yet
        with offline(target(name), Recorder()):
            train_step(tiny_model(dtype), autocast, eps=1e-8)
