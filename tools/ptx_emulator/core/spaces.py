"""Arrays of registers and memory, and where each state space lies in an address."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED: dict[int, Any] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
FLOAT: dict[int, Any] = {2: np.float16, 4: np.float32, 8: np.float64}

HEAP_BASE = 0x1_0000_0000  # no shared or local offset looks like a global address, and null is unmapped
SHARED_BASE = 1024  # shared addresses below stay unmapped, so that a null shared pointer faults
RANK_SHIFT = 24  # mapa: (rank + 1) << RANK_SHIFT | address in the CTA's own memory
SHARED_WINDOW = 0x7F00_0000_0000  # where cvta.shared puts shared memory in the generic space
LOCAL_WINDOW = 0x7E00_0000_0000
PARAM_WINDOW = 0x7D00_0000_0000  # where cvta.param puts the kernel's parameters
CONST_WINDOW = 0x7C00_0000_0000
WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW, "const": CONST_WINDOW}
