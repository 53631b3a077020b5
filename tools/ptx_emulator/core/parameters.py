"""The parameter space of a launch: numbers, or the bytes of structs and tensor maps."""

import struct
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from ptx_emulator.core.kernel import Kernel, Parameter
from ptx_emulator.core.spaces import Array

SCRATCH_PARAMETERS = 2  # Triton ends every kernel with two pointers to scratch memory that these kernels do not use
_FORMAT = {"f16": "<e", "f32": "<f", "f64": "<d"}


@runtime_checkable
class Packed(Protocol):
    """What gives its own bytes, as a tensor map does."""

    def pack(self) -> bytes:
        """The bytes of the parameter."""


Argument = int | float | bytes | Packed


def pack(kernel: Kernel, arguments: Sequence[Argument]) -> Array:
    """The parameter space of a launch as bytes. Raises ValueError or TypeError for arguments that do not fit."""
    wanted = len(kernel.parameter_list)
    values = list(arguments)
    if len(values) == wanted - SCRATCH_PARAMETERS:
        values += [0] * SCRATCH_PARAMETERS
    if len(values) != wanted:
        raise ValueError(f"{kernel.name} has {wanted} parameters, {len(arguments)} arguments were given")
    last = kernel.parameter_list[-1] if wanted else None
    space = np.zeros(last.offset + last.size if last else 0, np.uint8)
    for parameter, value in zip(kernel.parameter_list, values, strict=True):
        space[parameter.offset : parameter.offset + parameter.size] = np.frombuffer(_bytes(parameter, value), np.uint8)
    return space


def _bytes(parameter: Parameter, value: Argument) -> bytes:
    if isinstance(value, Packed):
        value = value.pack()
    if isinstance(value, bytes):
        if len(value) != parameter.size:
            raise ValueError(f"parameter {parameter.name} has {parameter.size} bytes, {len(value)} were given")
        return value
    if parameter.is_array:
        raise TypeError(
            f"parameter {parameter.name} is a struct of {parameter.size} bytes: pass its bytes or a TensorMap, "
            f"not {type(value).__name__}"
        )
    if isinstance(value, float | np.floating):
        kind = parameter.type if parameter.type in _FORMAT else {4: "f32", 8: "f64"}.get(parameter.size)
        if kind is None or parameter.type[0] in "us":
            raise TypeError(f"parameter {parameter.name} is .{parameter.type}; it cannot take the float {value}")
        return struct.pack(_FORMAT[kind], float(value))
    if isinstance(value, int | np.integer | bool):
        if parameter.type in _FORMAT:
            raise TypeError(
                f"parameter {parameter.name} is .{parameter.type}; pass a float, or the {parameter.size} bytes of its "
                f"bits, not the int {value}"
            )
        bits = 8 * parameter.size
        if not -(1 << (bits - 1)) <= int(value) < 1 << bits:
            raise ValueError(f"parameter {parameter.name} has {bits} bits; {value} does not fit")
        return (int(value) & ((1 << bits) - 1)).to_bytes(parameter.size, "little")
    raise TypeError(f"parameter {parameter.name} takes a number or bytes, not {type(value).__name__}")
