"""The emulator itself: reads PTX, executes it, checks it and counts what it does. It imports NumPy and nothing else."""
