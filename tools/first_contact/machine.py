"""A description of the machine by its own commands, run in turn; a failure does not stop the next one."""

from __future__ import annotations

import os
import subprocess
import sys

_VERSIONS = """
import importlib.metadata as m
for name in sorted({d.metadata["Name"] or "" for d in m.distributions()}, key=str.lower):
    print(name, m.version(name) if name else "")
"""
_TORCH = """
import torch, triton
print("torch", torch.__version__, "CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version())
print("triton", triton.__version__, "available", torch.cuda.is_available())
print(torch.cuda.get_device_properties(0))
print(torch.__config__.show())
"""
COMMANDS = (
    ("nvidia-smi",),
    ("nvidia-smi", "-q"),
    ("nvcc", "--version"),
    ("lscpu",),
    ("free", "-g"),
    ("df", "-h", "/", "/tmp", "/dev/shm"),
    ("uname", "-a"),
    ("ncu", "--version"),
    ("compute-sanitizer", "--version"),
    ("gcc", "--version"),
    ("git", "rev-parse", "HEAD"),
    (sys.executable, "-c", _TORCH),
    (sys.executable, "-c", _VERSIONS),
)


def main() -> None:
    """Run every command and print its output."""
    for command in COMMANDS:
        print(f"$ {' '.join(command).strip()}", flush=True)
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)
            print(done.stdout, done.stderr, f"[exit status {done.returncode}]\n", flush=True)
        except (OSError, subprocess.TimeoutExpired) as error:
            print(f"[{error}]\n", flush=True)
    print({name: value for name, value in os.environ.items() if name.startswith(("CUDA", "NVIDIA", "TORCH", "TRITON"))})


if __name__ == "__main__":
    main()
