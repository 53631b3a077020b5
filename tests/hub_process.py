"""A process that has the hub's package and not ours: `hub_process.py PACKAGE PROBLEM RESULTS`, started by a test.

It runs the problem on each backend, then imports the installed package beside the loaded one.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any


class Barred:
    """A finder that knows no package of ours, whatever is installed or on the path."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] in ("cast", "cast_kernels"):
            raise ModuleNotFoundError(f"{name} is barred in this process", name=name)
        return None


def main(package: Path, problem: Path, results: Path) -> None:
    barred = Barred()
    sys.meta_path.insert(0, barred)  # type: ignore[arg-type]
    import kernels
    import torch

    ops = kernels.get_local_kernel(package)
    given, found = torch.load(problem), {}
    for backend in ("eager", "triton"):
        module = ops.BCAST(**given["sizes"], backend=backend)
        module.load_state_dict(given["state"])
        inputs = [x.clone().requires_grad_() for x in given["inputs"]]
        outputs = module(*inputs)
        torch.autograd.backward(outputs, given["grads"])
        named = {"spatial": outputs[0], "temporal": outputs[1]}
        named |= {"grad.spatial": inputs[0].grad, "grad.temporal": inputs[1].grad}
        named |= {f"grad.{name}": p.grad for name, p in module.named_parameters()}
        found[backend] = {name: x.detach().double() for name, x in named.items()}
    ours = sorted(name for name in sys.modules if name.partition(".")[0] in ("cast", "cast_kernels"))
    try:
        ops.BCAST(**given["sizes"], backend="cpu")(*given["inputs"])
        native = ""
    except ops.BackendError as error:
        native = str(error)

    sys.meta_path.remove(barred)  # type: ignore[arg-type]
    import cast_kernels

    torch.save(
        {
            "found": found, "ours": ours, "native": native, "name": ops.__name__,
            "operators": [name for name in dir(torch.ops) if "cast_kernels" in name],
            "packets": [str(getattr(torch.ops, name).bcast) for name in ("cast_kernels", ops.__name__)],
            "beside": bool(cast_kernels.BCAST is not ops.BCAST),
        },
        results,
    )  # fmt: skip


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
