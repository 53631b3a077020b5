"""`python -m first_contact.worker ROOM`: run the rows of one room in turn; report each at once."""

from __future__ import annotations

import sys
import time
import traceback

from first_contact.device import device
from first_contact.rows import BROKEN, Rows


def main() -> int:
    """Run a room's rows until the time is over -> exit status."""
    rows = Rows()
    with device() as machine:
        from first_contact.rooms import rows_of  # imported after the device is in place

        room = rows_of(sys.argv[1], machine)
        rows.plan(room)
        for name, find in room.items():
            if name in rows.begun or rows.seconds_left() < 1:
                continue
            rows.begin(name)
            begin = time.perf_counter()
            try:
                found = find()
            except Exception as error:  # after any error, the next row may still be right
                traceback.print_exc()
                found = {"ok": False, "why_not": f"{type(error).__name__}: {error}"}
            rows.end(name, **found, s=time.perf_counter() - begin)
            try:
                machine.synchronise()
            except Exception:  # a kernel faulted: CUDA repeats its error until the process ends
                traceback.print_exc()
                return BROKEN
    return 0


if __name__ == "__main__":
    sys.exit(main())
