"""`python -m ptx_emulator`."""

import sys

from ptx_emulator.command import main

sys.exit(main(sys.argv[1:]))
