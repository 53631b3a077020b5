"""Deliberate faults, each of which must make a test fail: the proof that the tests can fail.

    python tests/mutations.py            # all, 10 to 60 seconds each
    python tests/mutations.py residual   # those whose name contains the word
    python tests/mutations.py --list

Each fault is a few exact text replacements. They are made in a copy of the tree; the copy is built and tested; a
fault that no test notices has survived. The exit status is 1 if one survives, or if a text that should be replaced is
not there (exactly once) any more, or if the tests fail without any fault.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent

#: What notices a fault: the native test program in one of its builds. Anything else is pytest's arguments.
NATIVE, MEMORY, RACE = "native", "memory", "race"
BUILDS = {
    NATIVE: ["-DCAST_OPTIMISE=-O1"],
    MEMORY: ["-DCAST_KERNELS_SANITIZE=address,undefined"],
    RACE: ["-DCAST_KERNELS_SANITIZE=thread"],
}
BCAST = "tests/test_bcast.py -k error_against_fp64"
#: That one compares with eager's own error, so it cannot see a fault that eager shares; this one does.
BF16 = "tests/test_bf16_products.py"
REFERENCE_TEST = "tests/test_bcast.py -k eager_equals_reference"


@dataclass(frozen=True)
class Fault:
    """One deliberate fault: (file, text, its replacement) triples, and what must notice it."""

    name: str
    noticed_by: str
    edits: tuple[tuple[str, str, str], ...]


FORWARD, BACKWARD = "csrc/cpu/bcast_forward.h", "csrc/cpu/bcast_backward.h"
SUMS, SIMD, NORM = "csrc/cpu/weight_sums.h", "csrc/cpu/simd.h", "csrc/cpu/layernorm.h"
PLAN, PROBLEM, PACKED = "csrc/cpu/forward_plan.h", "csrc/cpu/problem.h", "cast_kernels/cpu/packed.py"
ATTENTION, GRADIENT, WORKSPACE = "csrc/cpu/attention.h", "csrc/cpu/attention_backward.h", "csrc/cpu/workspace.cpp"
FFN, FFN_BACKWARD, WORDS = "csrc/cpu/ffn_forward.h", "csrc/cpu/ffn_backward.h", "csrc/cpu/bf16.h"
SELF, SELF_BACKWARD = "csrc/cpu/self_attention_forward.h", "csrc/cpu/self_attention_backward.h"
SIDES = "tests/test_short_side.py -k evaluat"
ORIENTATION, FOLDER = "cast/video/orientation.py", "cast/video/folder.py"
EAGER, CPU, REFERENCE = "cast_kernels/eager/bcast.py", "cast_kernels/cpu/bcast.py", "cast_kernels/reference.py"


def fault(name: str, noticed_by: str, *edits: tuple[str, str, str]) -> Fault:
    return Fault(name, noticed_by, edits)


FAULTS = [
    # --- the mathematics
    fault("CLS of the first frame for all frames", NATIVE, (FORWARD, "run.clip(local), t)", "run.clip(local), 0)")),
    fault("CLS gradient through attention", NATIVE,
          (BACKWARD, "from_output = has_direction(p, stream) && is_cls(r);", "from_output = false;")),
    fault("CLS counted in the projection's gradients", NATIVE,
          (SUMS, "const bool cls = at.n < 0;\n    rows.left[r] = cls && left.skip_cls",
           "const bool cls = at.n < 0;\n    rows.left[r] = cls && false")),
    fault("CLS rule dropped in eager", REFERENCE_TEST,
          (EAGER, "torch.cat([F.gelu(u_s[:, :, :1])", "torch.cat([F.gelu(u_t[:, :, :1])")),
    fault("tanh for erf GELU", NATIVE,
          (SIMD, "return x * normal(x).cdf; }",
           "return x / (1.0f + exp2((x + x * x * x * 0.044715f) * -2.302208f)); }")),
    fault("GELU slope without its density", NATIVE, (SIMD, "return n.cdf + x * n.density;", "return n.cdf;")),
    fault("eps 1e-5 for 1e-6", REFERENCE_TEST, ("cast_kernels/problem.py", "EPS = 1e-6", "EPS = 1e-5")),
    fault("eps ten times in the core", NATIVE, (NORM, "variance + eps", "variance + 10 * eps")),
    fault("LayerNorm without centring", NATIVE,
          (NORM, "const vec hat = (load_first(x + c, lanes) - s.mean) * s.rstd;\n    if (normed)",
           "const vec hat = load_first(x + c, lanes) * s.rstd;\n    if (normed)")),
    fault("LayerNorm gradient without its mean", NATIVE, (NORM, "(scaled(c) - mean - hat", "(scaled(c) - hat")),
    fault("scale before the up-projection's bias", NATIVE,
          (FORWARD, "load_first(x + at + c, n) + y * scale, n)",
           "load_first(x + at + c, n) + (y - load_first(bias + column + c, n)) * scale + "
           "load_first(bias + column + c, n), n)")),
    fault("residual dropped forward", NATIVE, (FORWARD, "load_first(x + at + c, n) + y * scale, n)", "y * scale, n)")),
    fault("residual dropped backward", NATIVE,
          (BACKWARD, "if (!residual) return store_row", "if (true) return store_row")),
    fault("swapped position tables", NATIVE, (FORWARD, "asks.q_pos, block", "asks.kv_pos, block")),
    fault("value bias taken from the keys", NATIVE,
          (FORWARD, "answers.kv_bias + d, s.slot", "answers.kv_bias, s.slot")),
    fault("space window one key short", NATIVE,
          (FORWARD, "block.indices, window, hd};", "block.indices, window - (p.window[direction] == kSpace), hd};")),
    fault("space window shifted by one position", NATIVE,
          (PROBLEM, "== kSpace) return {t, n};", "== kSpace) return {t, (n + 1) % p.patches};")),
    fault("softmax scaled by the head dimension", NATIVE,
          (FORWARD, "1.44269504088896f / __builtin_sqrtf(float(hd))", "1.44269504088896f / float(hd)")),
    fault("running maximum without rescaling", NATIVE,
          (ATTENTION, "v += load(sum + c) * factors[i];", "v += load(sum + c);")),
    fault("softmax gradient without its mean", NATIVE, (GRADIENT, "(acc[r][c] - delta[c])", "(acc[r][c])")),
    fault("drop-path factor left out of the weight's gradient", NATIVE,
          (SUMS, "branch_scale(p, run.call.scale, left.stream, run.first_clip + clip, at.n) : 1.0f", "1.0f : 1.0f")),
    fault("windows exchanged on the way to the core", BCAST,
          (CPU, '"time": 0, "space": 1', '"time": 1, "space": 0')),
    fault("GELU left out of the reference", REFERENCE_TEST,
          (REFERENCE, "F.linear(F.gelu(x), p.up_weight", "F.linear(x, p.up_weight")),
    # --- state
    fault("stale packed weights", "tests/test_packed.py",
          (PACKED, "w.data_ptr(), w._version, w.shape", "w.data_ptr(), w.shape")),
    fault("slack of the saved state not defined", NATIVE,
          (FORWARD, "  if (plan.kept.total)\n", "  if (plan.kept.total < 0)\n")),
    fault("packing in training not dropped", "tests/test_packed.py",
          (PACKED, "        _KEPT.pop(present[0], None)", "        pass")),
    # --- memory
    fault("a float stored past a row", NATIVE,
          (SIMD, "for (i64 i = 0; i < n; ++i) p[i] = lanes[i];", "for (i64 i = 0; i <= n; ++i) p[i] = lanes[i];")),
    fault("a float read past a row", MEMORY,
          (SIMD, "for (i64 i = 0; i < n; ++i) lanes[i] = p[i];", "for (i64 i = 0; i <= n; ++i) lanes[i] = p[i];")),
    fault("scratch memory one buffer short", MEMORY, (PLAN, "2 * align16(rows * p.bottleneck) + att", "att")),
    fault("a table of integers at an odd float", MEMORY,
          (PLAN, "reinterpret_cast<i64*>(at);", "reinterpret_cast<i64*>(at + 1);")),
    # --- threads
    fault("no barrier between projections and attention", RACE,
          (FORWARD, "  parallel_for(all[0] + all[1], threads, [&](i64 task, int thread) {",
           "  const auto project = [&](i64 task, int thread) {"),
          (FORWARD, "scratch + thread * plan.scratch));\n  });", "scratch + thread * plan.scratch));\n  };"),
          (FORWARD, "  parallel_for(s2t + t2s + ceil_div(cls_rows, kRowBlock), threads, [&](i64 task, int thread) {\n",
           "  parallel_for(all[0] + all[1] + s2t + t2s + ceil_div(cls_rows, kRowBlock), threads, "
           "[&](i64 task, int thread) {\n"
           "    if (task < all[0] + all[1]) return project(task, thread);\n    task -= all[0] + all[1];\n")),
    fault("one scratch buffer for all threads", RACE,
          (BACKWARD, "which ? task - first_count : task, scratch + thread * plan.scratch)",
           "which ? task - first_count : task, scratch)")),
    fault("kept scratch memory taken without the lock", RACE,
          (WORKSPACE, "  {\n    const std::lock_guard<std::mutex> lock(kept().mutex);\n    if (kept().bytes >= bytes_)",
           "  {\n    if (kept().bytes >= bytes_)")),
    # --- the experts' ops
    fault("QuickGELU with 1.7", NATIVE, (SIMD, "x * -2.45546696f", "x * -2.45258156f")),
    fault("FFN's adapter without its scale", NATIVE,
          (FFN, "s.factor[r] = p.adapter_scale * (call.row_scale", "s.factor[r] = (call.row_scale")),
    fault("FFN without its residual", NATIVE,
          (FFN, "load_first(x + at + c, n) + (load_first(sum + at + c, n) + part), n)",
           "load_first(sum + at + c, n) + part, n)")),
    fault("FFN's second bias once a chunk", NATIVE, (FFN, "index == 0 ? own.out_bias : nullptr", "own.out_bias")),
    fault("FFN's drop-path factor not in backward", NATIVE,
          (FFN_BACKWARD, "p.adapter_scale * (run.call.row_scale ? run.call.row_scale[row] : 1.0f);",
           "p.adapter_scale;")),
    fault("FFN's gradient without the residual's", NATIVE,
          (FFN_BACKWARD, "add_rows(run.call.grad_y + row * D, grad, D, run.call.grad_x + row * D);",
           "__builtin_memcpy(run.call.grad_x + row * D, grad, sizeof(float) * size_t(D));")),
    fault("self-attention scaled by the model's width", NATIVE,
          (SELF, "1.44269504088896f / __builtin_sqrtf(float(hd));",
           "1.44269504088896f / __builtin_sqrtf(float(p.dim));")),
    fault("self-attention's keys and values exchanged", NATIVE,
          (SELF, "*key = query + p.heads * matrix, *value = key + p.heads * matrix;",
           "*value = query + p.heads * matrix, *key = value + p.heads * matrix;")),
    fault("self-attention's adapter without its skip", NATIVE,
          (SELF, "load_first(x + at + c, n) + load_first(projected + at + c, n) + up, n)",
           "load_first(x + at + c, n) + up, n)")),
    fault("self-attention's gradient past the adapter only", NATIVE,
          (SELF_BACKWARD, "store_first(da + at + c, y + load_first(grad + at + c, n), n);",
           "store_first(da + at + c, y, n);")),
    fault("depths of a bfloat16 word exchanged", BF16,
          (WORDS, "(rounded_bf16(low) >> 16) | rounded_bf16(high)", "(rounded_bf16(high) >> 16) | rounded_bf16(low)")),
    # --- files
    fault("a mirrored file shown by its angle alone", "tests/test_video_reader.py -k display_matrix",
          (ORIENTATION, "picture, across, down = picture.swapaxes(0, 1), c, b",
           "picture, across, down = picture.swapaxes(0, 1), -b, b")),
    fault("a file shown at any angle as it is stored", "tests/test_video_reader.py -k turned_otherwise",
          (ORIENTATION, "        raise video_error(\n            path,\n            f\"is to be shown",
           "        return picture\n        raise video_error(\n            path,\n            f\"is to be shown")),
    fault("pictures shrunk without antialiasing", "tests/test_video_shrink.py",
          ("cast/video/shrink.py", "antialias=True", "antialias=False")),
    fault("tests that look at pictures as they are stored", SIDES,
          ("cast/evaluation/protocol.py", "decoder(self.decoder, self.short_side)", "decoder(self.decoder)")),
    fault("a stream that is not shrunk", SIDES,
          ("cast/predict/window.py", "shrink(np.ascontiguousarray(frame), self.protocol.short_side)",
           "np.ascontiguousarray(frame)")),
    fault("a model that forgets its short side", SIDES,
          ("cast/hub.py", "as_json(self.sampling, self.short_side)", "as_json(self.sampling)")),
    fault("endings in small letters only", "tests/test_video_folder.py",
          (FOLDER, "path.suffix.lower() not in", "path.suffix not in")),
    fault("linked folders searched as often as they are linked", "tests/test_video_folder.py -k links",
          (FOLDER, "            seen.add((status.st_dev, status.st_ino))\n",
           "            seen.add((status.st_dev, status.st_ino)) if not place.is_symlink() else None\n")),
    fault("names printed as Python holds them", "tests/test_video_folder.py",
          ("cast/files.py", "return _SURROGATE.sub(", "return os.fspath(name) or _SURROGATE.sub(")),
    fault("a wait for a camera without an end", "tests/test_video_stream_waits.py -k in_time --timeout 20",
          ("cast/video/stream.py", "self._made.get(timeout=seconds or None)", "self._made.get()"),
          ("cast/video/stream.py", "limit + _LONGER if limit else None", "None")),
]  # fmt: skip


def apply(fault: Fault, tree: Path) -> dict[Path, str]:
    """Make the fault in `tree`; returns the former contents of the files changed.

    Raises:
        LookupError: a text to replace is not there exactly once.
    """
    before: dict[Path, str] = {}
    for name, text, replacement in fault.edits:
        path = tree / name
        content = path.read_text()
        before.setdefault(path, content)
        if content.count(text) != 1:
            for changed, former in before.items():
                changed.write_text(former)
            raise LookupError(f"{name} holds {text!r} {content.count(text)} times, not once")
        path.write_text(content.replace(text, replacement))
    return before


def copy_tree(to: Path) -> None:
    """What building and testing needs, with the built Python module."""
    useless = shutil.ignore_patterns("__pycache__", ".git")
    for name in ("cast", "cast_kernels", "csrc", "tests"):
        shutil.copytree(ROOT / name, to / name, ignore=useless)
    for name in ("CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, to)


def call(command: list[str], tree: Path) -> tuple[bool, str]:
    """Whether the command succeeded in the tree, and what it said."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_WAIT_POLICY": "passive"}
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return False, "no end within 300 s"
    return done.returncode == 0, done.stdout + done.stderr


def passes(noticed_by: str, tree: Path) -> tuple[bool, str]:
    """Whether the tests pass in the tree, and the line that says why not.

    Raises:
        RuntimeError: the tree cannot be built.
    """
    if noticed_by not in BUILDS:
        pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        good, text = call([*pytest, *noticed_by.split()], tree)
        return good, next((x for x in reversed(text.splitlines()) if x.startswith(("FAILED", "ERROR"))), text[-200:])
    build = tree / "build" / noticed_by
    if not build.exists():
        options = ["-DCAST_KERNELS_NATIVE_TESTS=ON", "-DCAST_KERNELS_LEVELS=baseline", *BUILDS[noticed_by]]
        good, text = call(["cmake", "-G", "Ninja", "-S", str(tree), "-B", str(build), *options], tree)
        if not good:
            raise RuntimeError(text[-2000:])
    good, text = call(["cmake", "--build", str(build)], tree)
    if not good:
        raise RuntimeError(text[-2000:])
    good, text = call([str(build / "tests/native/native_tests"), "--few", "--repeats", "3"], tree)
    signs = ("FAIL", "WARNING: ThreadSanitizer", "==ERROR", "runtime error", "ERROR: AddressSanitizer")
    return good, next((x for x in text.splitlines() if any(sign in x for sign in signs)), text[-200:])


def judge(fault: Fault, tree: Path) -> tuple[str, str]:
    """What became of the fault, and the sign of it."""
    try:
        before = apply(fault, tree)
    except LookupError as error:
        return "no longer applies", str(error)
    try:
        good, sign = passes(fault.noticed_by, tree)
        return ("SURVIVED", "") if good else ("killed", sign)
    except RuntimeError as error:
        return "does not build", str(error)
    finally:
        for path, content in before.items():
            path.write_text(content)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only faults whose names contain one of these")
    parser.add_argument("--list", action="store_true", help="print the names only")
    given = parser.parse_args(arguments)
    chosen = [f for f in FAULTS if not given.words or any(word in f.name for word in given.words)]
    if given.list:
        print("\n".join(f.name for f in chosen))
        return 0
    if not chosen:
        parser.error(f"no fault's name contains {' or '.join(given.words)}")
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        for noticed_by in dict.fromkeys(f.noticed_by for f in chosen):
            good, sign = passes(noticed_by, tree)
            if not good:
                print(f"the tests fail without any fault ({noticed_by}): {sign}")
                return 1
        for one in chosen:
            start = time.monotonic()
            verdict, sign = judge(one, tree)
            bad += verdict != "killed"
            by, seconds = one.noticed_by.split()[0], time.monotonic() - start
            print(f"{verdict:<9} {one.name:<52} {by:<22} {seconds:4.0f} s  {sign[:150]}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} faults killed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
