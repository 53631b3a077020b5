"""Ops: argument checks, registered operators and the public functions. One file a stem."""
