"""`python -m cast_kernels`, where the command `cast-kernels` is not installed."""

import sys

from cast_kernels.cli import main

sys.exit(main())
