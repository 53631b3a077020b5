"""Small PTX kernels for the emulator's tests: one thread per element, inputs in %a %b %c %e, outputs from %o %q."""

from collections.abc import Sequence

import numpy as np
import ptx_emulator
from engines import launch

HEADER = ".version 8.8\n.target sm_90a\n.address_size 64\n"
SCRATCH = ".reg .pred %p<9>; .reg .b16 %h<33>; .reg .b32 %r<129>; .reg .b64 %d<33>; .reg .f32 %f<33>;"
INPUTS, OUTPUTS = "abce", "oq"
UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def entry(
    code: str, parameters: int, *, name: str = "f", outside: str = "", scratch: str = SCRATCH, directives: str = ""
) -> str:
    """A module with one kernel. Its pointers are in %ptr0, %ptr1, ...; the thread's number is in %tid0."""
    params = ", ".join(f".param .u64 .ptr .global .align 1 x{i}" for i in range(parameters))
    loads = "".join(f"ld.param.b64 %ptr{i}, [x{i}];\n" for i in range(parameters))
    return (
        f"{HEADER}{outside}\n.visible .entry {name}({params})\n{directives}\n{{\n"
        f"{scratch}\n.reg .b64 %ptr<9>; .reg .b32 %tid0;\n{loads}mov.u32 %tid0, %tid.x;\n{code}\nret;\n}}\n"
    )


def run(
    text: str, arrays: Sequence[np.ndarray], *, grid: int = 1, threads: int = 32, **options: object
) -> ptx_emulator.Report:
    """Launch the only kernel of `text` on arrays, whose contents it changes."""
    (kernel,) = ptx_emulator.parse(text).kernels.values()
    memory = ptx_emulator.Memory()
    addresses = [memory.register(array.view(np.uint8).reshape(-1), name=f"x{i}") for i, array in enumerate(arrays)]
    options.setdefault("target", "sm_90")
    report = launch(kernel, grid=(grid, 1, 1), threads=threads, arguments=addresses, memory=memory, **options)  # type: ignore[arg-type]
    memory.write_back()
    return report


def lanewise(code: str, inputs: Sequence[np.ndarray], outputs: Sequence[np.dtype | type]) -> list[np.ndarray]:
    """Run `code` once per element of the inputs. A bool output is the predicate of that name."""
    count = len(inputs[0])
    padded = -(-count // 32) * 32
    arrays = []
    lines = ["mov.u32 %r127, %ctaid.x;", "mad.lo.u32 %r128, %r127, 32, %tid0;"]
    registers = []
    for i, array in enumerate(inputs):
        size = array.dtype.itemsize
        registers.append(f".reg .b{8 * size} %{INPUTS[i]};")
        lines.append(f"mad.wide.u32 %d32, %r128, {size}, %ptr{i}; ld.global.b{8 * size} %{INPUTS[i]}, [%d32];")
        arrays.append(np.concatenate([array, np.repeat(array[-1:], padded - count)]))
    lines.append(code)
    for i, dtype in enumerate(outputs, len(inputs)):
        name = OUTPUTS[i - len(inputs)]
        size = 4 if dtype is bool else np.dtype(dtype).itemsize
        registers.append(f".reg .pred %{name};" if dtype is bool else f".reg .b{8 * size} %{name};")
        value = f"%{name}"
        if dtype is bool:
            lines.append(f"selp.b32 %r126, 1, 0, %{name};")
            value = "%r126"
        lines.append(f"mad.wide.u32 %d32, %r128, {size}, %ptr{i}; st.global.b{8 * size} [%d32], {value};")
        arrays.append(np.zeros(padded, np.uint32 if dtype is bool else dtype))
    run(entry("\n".join(lines), len(arrays), scratch=SCRATCH + " ".join(registers)), arrays, grid=padded // 32)
    results = [array[:count] for array in arrays[len(inputs) :]]
    return [r.astype(bool) if dtype is bool else r for r, dtype in zip(results, outputs, strict=True)]


def edge_values(bits: int, count: int = 128) -> np.ndarray:
    """Random unsigned numbers of `bits` bits among 0, 1, -1, the extremes of both signs, and small numbers."""
    rng = np.random.default_rng(bits)
    top = 1 << bits
    edges = [0, 1, 2, 7, top - 1, top - 2, top // 2, top // 2 - 1, top // 2 + 1]
    dtype = UNSIGNED[bits // 8]
    values = rng.integers(0, top - 1, count, dtype=dtype, endpoint=True)
    picks = rng.random(count)
    values = np.where(picks < 0.4, rng.choice(np.array(edges, dtype), count), values)
    return np.where(picks > 0.8, values & dtype(31), values).astype(dtype)


def signed(value: int, bits: int) -> int:
    """The two's complement reading of an unsigned number."""
    return value - (1 << bits) if value >> (bits - 1) & 1 else value
