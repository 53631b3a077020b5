"""Faults in the mathematics, memory and threads of the native kernels and of eager."""

from __future__ import annotations

from faults.base import MEMORY, NATIVE, RACE, fault

BCAST = "tests/test_bcast.py -k error_against_fp64"
BF16 = "tests/test_bf16_products.py"
REFERENCE_TEST = "tests/test_bcast.py -k eager_equals_reference"
FORWARD = "csrc/cpu/bcast_forward.h"
BACKWARD = "csrc/cpu/bcast_backward.h"
SUMS = "csrc/cpu/weight_sums.h"
SIMD = "csrc/cpu/simd.h"
NORM = "csrc/cpu/layernorm.h"
PLAN = "csrc/cpu/forward_plan.h"
PROBLEM = "csrc/cpu/problem.h"
COMMON = "cast_kernels/cpu/common.py"
ATTENTION = "csrc/cpu/attention.h"
GRADIENT = "csrc/cpu/attention_backward.h"
WORKSPACE = "csrc/cpu/workspace.cpp"
FFN = "csrc/cpu/ffn_forward.h"
FFN_BACKWARD = "csrc/cpu/ffn_backward.h"
WORDS = "csrc/cpu/bf16.h"
SELF = "csrc/cpu/self_attention_forward.h"
SELF_BACKWARD = "csrc/cpu/self_attention_backward.h"
EAGER = "cast_kernels/eager/bcast.py"
CPU = "cast_kernels/cpu/bcast.py"
REFERENCE = "cast_kernels/reference.py"

FAULTS = [
    # --- the mathematics
    fault("CLS of the first frame for all frames", NATIVE, (FORWARD, "run.clip(local), t)", "run.clip(local), 0)")),
    fault("CLS gradient through attention", NATIVE,
          (BACKWARD, "from_output = has_direction(p, stream) && is_cls(r);", "from_output = false;")),
    fault("CLS counted in the projection's gradients", NATIVE,
          (SUMS, "const bool cls = at.n < 0;\n    rows.left[r] = cls && left.skip_cls",
           "const bool cls = at.n < 0;\n    rows.left[r] = cls && false")),
    fault("CLS rule dropped in eager", REFERENCE_TEST,
          (EAGER, "hidden = activate(u_s[:, :, :1]", "hidden = activate(u_t[:, :, :1]")),
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
          (FORWARD, " window,\n", " window - (p.window[direction] == kSpace),\n")),
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
    fault("weights kept by address and version", "tests/test_changing_weights.py",
          (COMMON, "class Addresses:", "_KEPT: dict = {}\n\n\nclass Addresses:"),
          (COMMON, "        tensor = tensor.detach().to(torch.float32).contiguous()\n",
           "        key = (id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)\n"
           "        tensor = _KEPT.setdefault(key, tensor.detach().to(torch.float32).clone())\n")),
    fault("transposed block of another row", NATIVE,
          ("csrc/cpu/pack.h", "block[r] = load(from + r * depth + k);",
           "block[r] = load(from + k);")),
    fault("slack of the saved state not defined", NATIVE,
          (FORWARD, "  if (plan.kept.total)\n", "  if (plan.kept.total < 0)\n")),
    # --- memory
    fault("a list that takes one job more than it holds", NATIVE,
          ("csrc/cpu/job_list.h", "if (count_ == kMost) refuse_job(Job::kList, kMost);", "")),
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
]  # fmt: skip
