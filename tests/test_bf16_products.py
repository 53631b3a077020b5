"""Dense products in bfloat16 pairs, on any processor: the level avx512_bf16 with its one instruction spelled out.

A processor with AVX512_BF16 runs the same packing, tails and strides. Here the core is built with CAST_EMULATE_BF16
and each op is compared, under autocast, with what PyTorch makes of the same call.

Called as a script, it prints the worst error over eager's of each op as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cast_kernels import _native

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_native.CORE is None, reason=f"nothing to test: {_native.REASON}"),
]


def worst_ratios() -> dict[str, dict[str, float]]:
    """Op -> the largest error against fp64 over autocast eager's, and the smallest over fp32's, of any tensor."""
    import bcast_cases
    import ffn_cases
    import self_attention_cases

    # Odd depths, sizes below a vector and a tile, several chains of additions, stacked weights.
    cases = {
        bcast_cases: [
            bcast_cases.AWKWARD,
            *bcast_cases.CASES[9:12],
            bcast_cases.small(patches=11, dim=300, bottleneck=72),
        ],
        ffn_cases: [c for c in ffn_cases.CASES if c.dim > 1][:6],
        self_attention_cases: self_attention_cases.CASES[:6],
    }
    worst = {}
    for module, problems in cases.items():
        over_eager, over_fp32 = 0.0, float("inf")
        for case in problems:
            exact = module.run(case, torch.float64, None)
            ours, eager = (
                module.run(case, torch.float32, backend, autocast=torch.bfloat16) for backend in ("cpu", "eager")
            )
            plain = module.run(case, torch.float32, "cpu")
            pooled = [sum(_relative(x[k], exact[k]) for k in exact) for x in (ours, eager, plain)]
            over_eager, over_fp32 = max(over_eager, pooled[0] / pooled[1]), min(over_fp32, pooled[0] / pooled[2])
        worst[module.__name__] = {"over_eager": over_eager, "over_fp32": over_fp32}
    return worst


def _relative(x: torch.Tensor, exact: torch.Tensor) -> float:
    size = float(exact.square().mean().sqrt())
    return float((x - exact).square().mean().sqrt()) / size if size else 0.0


@pytest.fixture(scope="module")
def ratios(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    folder = tmp_path_factory.mktemp("emulated")
    shutil.copytree(ROOT / "cast_kernels", folder / "cast_kernels")
    level = "avx2" if "avx2" in _native.CORE.built_levels() and _native.ISA != "baseline" else "baseline"
    environment = os.environ | {"CXXFLAGS": "-DCAST_EMULATE_BF16", "CAST_KERNELS_CPU_ISA": level}
    cmake = shutil.which("cmake") or str(Path(sys.executable).parent / "cmake")
    ninja = shutil.which("ninja") or str(Path(sys.executable).parent / "ninja")
    import pybind11

    configure = [
        cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-S", str(ROOT), "-B", str(folder / "build"),
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DCAST_KERNELS_LEVELS=baseline;avx2", "-DCAST_OPTIMISE=-O1",
    ]  # fmt: skip
    for command in (configure, [cmake, "--build", str(folder / "build")]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
    module = next((folder / "build").glob("_C*"))
    shutil.copy2(module, folder / "cast_kernels" / module.name)
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, __file__], env=environment, cwd=folder, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("op", ["bcast_cases", "ffn_cases", "self_attention_cases"])
def test_error_is_at_most_twice_eagers_under_autocast(ratios: dict[str, dict[str, float]], op: str) -> None:
    assert ratios[op]["over_eager"] <= 2.0
    # Else the float32 kernels ran and nothing was tested.
    assert ratios[op]["over_fp32"] >= 50.0


if __name__ == "__main__":
    print(json.dumps(worst_ratios()))
