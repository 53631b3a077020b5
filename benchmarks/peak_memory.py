"""Peak memory of two training steps, in a separate process.

    python benchmarks/peak_memory.py '{"variant": "base", "batch": 2, "arguments": {"backend": "cpu"}}'

prints {"before_mib": ..., "peak_mib": ...}.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def measure_apart(variant: str, batch: int, arguments: dict[str, Any]) -> dict[str, float]:
    """Resident MiB before the first training step and at the peak of two steps, in a new process.

    Args:
        variant, arguments: as in :func:`models.make_model`, and the `backend` to run.
        batch: clips of a step.

    Raises:
        Unavailable: the process failed; the message is its last line.
    """
    from measure import Unavailable

    request = {"variant": variant, "batch": batch, "arguments": arguments}
    command = [sys.executable, str(Path(__file__).resolve()), json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def main(request: dict[str, Any]) -> None:
    from measure import peak_memory
    from models import Training, make_batch, make_model

    arguments = request["arguments"]
    backend = arguments.pop("backend", "auto")
    model = make_model(request["variant"], **arguments).fuse(backend)
    training = Training(model, *make_batch(model.config, request["batch"]))
    print(json.dumps(peak_memory(lambda: [training.step() for _ in range(2)])))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
