"""CAST against the golden files: published mathematics on random weights, two layers, fp32.

Every logit, every block's two outputs and every gradient, with the exchange fused and eager. The error of a
tensor is its largest absolute difference over its largest absolute value.
"""

import pytest
import torch
import torch.nn.functional as F
from cast_models import GOLDEN, read_golden, under
from torch import Tensor

import cast

TOLERANCE = 1e-5


def assert_close(name: str, ours: Tensor, golden: Tensor) -> None:
    assert ours.shape == golden.shape, name
    scale = golden.abs().max()
    assert torch.equal(ours, golden) or (ours - golden).abs().max() <= TOLERANCE * scale, name


@pytest.fixture(params=[True, False], ids=["fused", "eager"])
def fused(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.mark.parametrize(("name", "heads"), GOLDEN.items(), ids=GOLDEN)
def test_golden(name: str, heads: dict[str, int], fused: bool) -> None:
    metadata, tensors = read_golden(name)
    model = cast.CAST(
        heads=heads,
        fused=fused,
        image_size=int(metadata["img_size"]),
        **{k: int(metadata[k]) for k in ("patch_size", "embed_dim", "depth", "num_heads", "num_frames", "down_ratio")},
    )
    model.load_state_dict(under(tensors, "weight."))
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    logits = model(tensors["input"])

    for head, golden in under(tensors, "logits.").items():
        assert_close(head, logits[head], golden)
    assert len(outputs) == int(metadata["depth"])
    for i, (spatial, temporal) in enumerate(outputs):
        # golden: spatial [1+N, B*T, D], temporal [B, T*N, D]
        assert_close(f"block {i} spatial", spatial.flatten(0, 1).transpose(0, 1), tensors[f"block{i}.spatial"])
        assert_close(f"block {i} temporal", temporal.flatten(1, 2), tensors[f"block{i}.temporal"])

    loss = sum(F.cross_entropy(logits[head], target) for head, target in under(tensors, "target.").items())
    assert_close("loss", loss, tensors["loss"])
    loss.backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == under(tensors, "grad.").keys()
    for key, golden in under(tensors, "grad.").items():
        assert_close(key, gradients[key], golden)
