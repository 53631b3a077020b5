"""Calls and constructions of `bcast` that cannot be: each says what came and what is allowed."""

from __future__ import annotations

import pytest
import torch
from bcast_cases import AWKWARD

import cast_kernels

BAD_CALLS = {
    "rank": (lambda s, t: (s[0], t), ValueError, r"spatial has shape \(3, 8, 40\).*4 dimensions"),
    "tokens": (lambda s, t: (s[:, :, 1:], t), ValueError, r"spatial must be \(2, 3, 8, 40\)"),
    "frames": (lambda s, t: (s[:, :2], t[:, :2]), ValueError, r"t2s.q_pos has shape \(3, 24\).*2 frames.*\(2, 24\)"),
    "patches": (lambda s, t: (s[:, :, :6], t[:, :, :5]), ValueError, r"s2t.q_pos has shape \(7, 24\).*5 patches"),
    "dim": (
        lambda s, t: (s[..., :32], t[..., :32]),
        ValueError,
        r"spatial.down_weight has shape \(24, 40\).*\(24, 32\)",
    ),
    "mixed dtypes": (lambda s, t: (s.double(), t), TypeError, "dtypes are mixed.*float64"),
    "integers": (lambda s, t: (s.int(), t.int()), TypeError, "must be floating point"),
    "devices": (lambda s, t: (s.to("meta"), t), ValueError, "tensors lie on cpu and meta"),
    "array": (lambda s, t: (s.numpy(), t), TypeError, r"spatial is a numpy.ndarray; .*torch.from_numpy makes one"),
    "second array": (lambda s, t: (s, t.numpy()), TypeError, "temporal is a numpy.ndarray"),
    "list": (lambda s, t: (s.tolist(), t), TypeError, r"spatial is a list; .*torch.as_tensor makes one"),
    "none": (lambda s, t: (s, None), TypeError, r"temporal is None; it must be a torch.Tensor$"),
    "complex": (lambda s, t: (s.to(torch.complex64), t.to(torch.complex64)), TypeError, "must be floating point"),
    "scale array": (lambda s, t: (s, t, torch.ones(2).numpy()), TypeError, "spatial_scale is a numpy.ndarray"),
    "scale number": (lambda s, t: (s, t, None, 0.5), TypeError, "temporal_scale is a float"),
    "scale shape": (lambda s, t: (s, t, torch.ones(3)), ValueError, r"spatial_scale has shape \(3,\).*\[B\] = \(2,\)"),
    "scale dtype": (
        lambda s, t: (s, t, None, torch.ones(2, dtype=torch.int64)),
        TypeError,
        "temporal_scale is torch.int64",
    ),
    "scale grad": (
        lambda s, t: (s, t, torch.ones(2, requires_grad=True)),
        ValueError,
        "drop-path factors are constants",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_say_what_came_and_what_is_allowed(name: str) -> None:
    spoil, error, message = BAD_CALLS[name]
    case = AWKWARD
    with pytest.raises(error, match=message):
        case.module()(*spoil(*case.inputs()))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: tuple(p), "parameters is a tuple; it must be a cast_kernels.Parameters"),
        (lambda p: None, "parameters is a NoneType"),
        (lambda p: p._replace(spatial=None), "spatial is a NoneType; it must be a cast_kernels.Stream"),
        (lambda p: p._replace(t2s=p.spatial), "t2s is a Stream; it must be a cast_kernels.Direction"),
        (
            lambda p: p._replace(s2t=p.s2t._replace(q_pos=p.s2t.q_pos.detach().numpy())),
            "s2t.q_pos is a numpy.ndarray; it must be a torch.Tensor",
        ),
    ],
)
def test_parameters_of_another_kind_are_refused(spoil: object, message: str) -> None:
    parameters = spoil(AWKWARD.module().gathered())  # type: ignore[operator]
    with pytest.raises(TypeError, match=message):
        cast_kernels.bcast(*AWKWARD.inputs(), parameters, num_heads=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 5}, "bottleneck_dim 384 is not divisible by num_heads 5"),
        ({"windows": ("time", "spacetime")}, "'space-time'"),
        ({"windows": "time"}, "it must be two"),
        ({"directions": ("s2s",)}, "'t2s', 's2t'"),
        ({"directions": ("t2s", "t2s")}, "each once"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"bottleneck_dim": 1.5}, "must be an integer"),
        ({"backend": "gpu"}, "allowed: 'auto', 'triton', 'cuda', 'cpu', 'eager'"),
    ],
)
def test_bad_constructions_say_what_is_allowed(arguments: dict[str, object], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        cast_kernels.BCAST(**arguments)
