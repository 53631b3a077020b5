"""Faults in what surrounds the kernels: derivatives, layers that must be called, builds."""

from __future__ import annotations

from faults.base import fault

DERIVATIVES = "tests/test_derivatives.py -k"
FFN = "csrc/cpu/ffn_forward.h"
TRANSFORMS = "cast_kernels/ops/_derivatives.py"
LAUNCH = "cast_kernels/triton/launch.py"
BACKWARD_PLAN = "cast_kernels/triton/bcast_backward_plan.py"
PLAIN = "cast_kernels/plain.py"
CROSS = "cast_kernels/modules/cross_attention.py"
LAYERS = "tests/test_plain.py"
EVERYWHERE = "tests/test_plain_everywhere.py"

FAULTS = [
    # --- plans of backend triton
    fault("plan: kept when Triton's settings change", "tests/test_plan.py -k circumstances",
          (LAUNCH, "(device, _HOOKS.debug, compilation,", "(device, compilation,")),
    fault("plan: kernels given an address that they were not compiled for", "tests/test_plan.py -k not_aligned",
          (LAUNCH, "given[i] = aligned(given[i])", "pass")),
    fault("plan: launch hooks not called", "tests/test_plan.py -k hooks",
          (LAUNCH, "packed_metadata, metadata, enter, leave,", "packed_metadata, metadata, None, None,")),
    fault("plan: parts of an allocation overlap", "tests/test_plan.py -k takes",
          (LAUNCH, "return -(-count // LINE) * LINE", "return count")),
    fault("plan: sums made for frozen vectors", "tests/test_triton_launches.py -k frozen",
          (BACKWARD_PLAN, "if any(vector is not None for vector, _ in vectors):", "if True:")),
    # --- derivatives, and modules without memory
    fault("second derivative not refused", f"{DERIVATIVES} second_derivative",
          (TRANSFORMS, "lambda ctx, inputs, output: None, refuse)", "lambda ctx, inputs, output: None, lambda ctx, *_: "
           "(None,) * (len(ctx.needs_input_grad) - 4))")),
    fault("tangents not looked for", f"{DERIVATIVES} forward_mode",
          (TRANSFORMS, "if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):", "if False:")),
    fault("gradient of zeros for what is kept", f"{DERIVATIVES} what_it_keeps",
          (TRANSFORMS, "ctx.set_materialize_grads(False)", "ctx.set_materialize_grads(True)")),
    fault("nothing kept inside torch.func", f"{DERIVATIVES} vmap",
          (TRANSFORMS, "torch._C._are_functorch_transforms_active() or any", "any")),
    fault("transforms around a call see none of it", f"{DERIVATIVES} second_derivative",
          (TRANSFORMS, "if torch._C._are_functorch_transforms_active():\n            # A",
           "if False:\n            # A")),
    fault("vmap stacks its first entry", f"{DERIVATIVES} vmap",
          (TRANSFORMS, "x if dim is None else x.select(dim, index)", "x if dim is None else x.select(dim, 0)")),
    fault("math attention without its scale", f"{DERIVATIVES} maths_error",
          ("cast_kernels/attention.py", ".transpose(-2, -1) * q.shape[-1] ** -0.5", ".transpose(-2, -1)")),
    fault("scores of math attention in 16 bits", f"{DERIVATIVES} maths_error",
          ("cast_kernels/attention.py", "torch.promote_types(q.dtype, torch.float32)", "q.dtype")),
    fault("exchange not asked for math", f"{DERIVATIVES} model_takes",
          ("cast_kernels/attention.py", 'return "math" if check_name(attention) == "math" else "auto"',
           'return "auto" if check_name(attention) == "math" else "auto"')),
    fault("experts alone not asked for math", f"{DERIVATIVES} experts_alone",
          ("cast/layers.py", "num_heads=attention.num_heads, eps=norm.eps, **running._asdict())",
           'num_heads=attention.num_heads, eps=norm.eps, **running._replace(attention="auto")._asdict())')),
    fault("pre-training not asked for math", f"{DERIVATIVES} pretraining_takes",
          ("cast/pretrain/model.py", ", attention=attentions.check_name(attention))", ")")),
    fault("position table left to fresh memory", "tests/test_positions.py",
          ("cast/positions.py", "if after is not before and not after.is_meta:", "if False:")),
    fault("position table left on meta", "tests/test_positions.py",
          ("cast/positions.py", "if module.pos_embed.is_meta and like is not None:", "if False:")),
    fault("reset without the norms", "tests/test_positions.py",
          ("cast_kernels/modules/bcast.py", 'name in ("ln_s_cross", "ln_t_cross"):', "name in ():")),
    # --- layers that must be called
    fault("a replaced layer's weight is read", LAYERS,
          (PLAIN, "reading is None or kind.forward is not reading.forward", "reading is None")),
    fault("a forward on the instance is passed over", LAYERS, (PLAIN, '"forward" in module.__dict__', "False")),
    fault("a forward hook is passed over", LAYERS,
          (PLAIN, "module._forward_hooks or module._forward_pre_hooks", "module._forward_pre_hooks")),
    fault("a forward pre-hook is passed over", LAYERS,
          (PLAIN, "module._forward_hooks or module._forward_pre_hooks", "module._forward_hooks")),
    fault("a backward hook is passed over", LAYERS,
          (PLAIN, "module._backward_hooks or module._backward_pre_hooks", "module._backward_pre_hooks")),
    fault("global hooks are passed over", EVERYWHERE, (PLAIN, "if not any(_GLOBAL_HOOKS):", "if True:")),
    fault("FLOP counting takes kernels away", EVERYWHERE,
          (PLAIN, 'isinstance(getattr(hook, "__self__", None), ModuleTracker)', "False")),
    fault("any tensor's type is read", LAYERS,
          (PLAIN, "if type(tensor) not in _TENSORS:\n                return", "if False:\n                return")),
    fault("any layout is read", LAYERS, (PLAIN, "if tensor.layout is not torch.strided:", "if False:")),
    fault("a patch of every module's call is passed over", EVERYWHERE,
          (PLAIN, "if calls != _CALLS and not all(map(_is_of_torch, calls)):", "if False:")),
    fault("an exporter's wrapper takes kernels away", "tests/test_bcast.py -k export_round",
          (PLAIN, "if calls != _CALLS and not all(map(_is_of_torch, calls)):", "if calls != _CALLS:")),
    fault("a call on the instance is passed over", LAYERS, (PLAIN, ' or "_call_impl" in module.__dict__:', ":")),
    fault("memory that was freed is read", "tests/test_changing_weights.py -k freed",
          ("cast_kernels/cpu/common.py", "if tensor.numel() and not tensor.data_ptr():", "if False:")),
    fault("a bias that was added is not read", LAYERS, (PLAIN, "for field in reading.absent:", "for field in ():")),
    fault("layers inside a wrapper are not looked at", LAYERS,
          (PLAIN, "inside = obstacle_among(module, reading.layers)", 'inside = ""')),
    fault("a warning a call", LAYERS, (PLAIN, "elif _WARNED.get(owner) != found:", "else:")),
    fault("a named kernel falls back", LAYERS, (PLAIN, "        raise BackendError(text)\n", "        _warn(text)\n")),
    fault("a projection's own bias forgotten by modules", LAYERS,
          (CROSS, 'found.append(y + getattr(self, f"{name}_bias").to(y.dtype))', "found.append(y)")),
    fault("VideoMAE's bias forgotten by modules", LAYERS,
          ("cast/layers.py", "_added(self.qkv(x), self._bias())", "self.qkv(x)")),
    fault("the FFN's adapter whole by modules", LAYERS,
          ("cast/layers.py", "y = torch.add(y, branch, alpha=ADAPTER_SCALE)", "y = y + branch")),
    fault("no drop path by modules", LAYERS,
          ("cast/layers.py", "branch = branch * row_scale[..., None].to(branch.dtype)", "pass")),
    fault("the adapter's skip forgotten by modules", LAYERS,
          ("cast/layers.py", "y = y + adapter(a)", "y = x + adapter(a)")),
    fault("a wrapped embedding is read", "tests/test_pretrain.py -k wrapped",
          ("cast/pretrain/model.py", 'plain.global_obstacle() or plain.obstacle("patch_embed", self.patch_embed)',
           "plain.global_obstacle()")),
    fault("a stream passes over its block's hooks", "tests/test_baselines.py -k have_to_be_called",
          ("cast/baselines/streams.py", "    if found:\n        raise TypeError",
           "    if False:\n        raise TypeError")),
    # --- builds and versions
    fault("fast math not taken back", "tests/test_build_flags.py -k fast_math_changes",
          ("CMakeLists.txt", "foreach(flag -fno-fast-math -fno-unsafe-math-optimizations", "foreach(flag")),
    fault("fast math only warned of", "tests/test_build_flags.py -k do_not_compile",
          ("csrc/cpu/base.h", '#error "the kernels', '#warning "the kernels')),
    fault("this processor's instructions in the baseline", "tests/test_build_flags.py -k leak",
          ("CMakeLists.txt", "set(CAST_OLDEST -march=x86-64 -mno-sse3)", "set(CAST_OLDEST)")),
    fault("an sdist with built modules", "tests/test_build.py -k sdist_is",
          ("MANIFEST.in", "global-exclude *.so", "global-exclude")),
    fault("a wheel with what an earlier build left", "tests/test_build.py -k own_build",
          ("setup.py", "shutil.rmtree(library / package", "print(library / package")),
    fault("an old torch or Triton taken", "tests/test_versions.py -k old",
          ("cast_kernels/versions.py", "release(version) >= OLDEST[package]", "OLDEST[package]")),
]  # fmt: skip
