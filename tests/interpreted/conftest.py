"""Tests in this folder run kernels in Triton's interpreter, in a process that tests/test_triton_interpreter.py starts.

The interpreter is chosen when triton is imported, and the other tests need the compiler.
"""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton_interpreter import correct_bf16

    correct_bf16()
else:
    collect_ignore_glob = ["*.py"]
