"""Weights that change between two calls, in every way that is known: a call uses them as they are when it starts.

A version counter sees few of these writes, and an address none, so nothing derived from a weight may outlive a call.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed
from cast_models import randomise, small_video
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cast
from cast_kernels import BCAST, _native

pytestmark = pytest.mark.skipif(_native.CORE is None, reason=f"nothing to test: {_native.REASON}")


def small(seed: int = 0, **overrides: object) -> cast.CAST:
    """A small CAST in fp32 whose every operation runs on backend `cpu`, at evaluation."""
    sizes = {"image_size": 16, "patch_size": 8, "num_frames": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = cast.CAST(**(sizes | overrides)).fuse("cpu")
    return randomise(model, seed).eval()  # type: ignore[return-value]


def other(model: cast.CAST) -> cast.CAST:
    """The same model with other weights."""
    return randomise(copy.deepcopy(model), 9)  # type: ignore[return-value]


def run(model: cast.CAST) -> Tensor:
    answer = model(small_video(model, dtype=torch.float32))
    return torch.cat(list(answer.values()), 1)


def logits(model: cast.CAST) -> Tensor:
    with torch.no_grad():
        return run(model)


def unfused(model: cast.CAST) -> Tensor:
    """What PyTorch's operators make of the weights as they are."""
    model.unfuse()
    answer = logits(model)
    model.fuse("cpu")
    return answer


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """What backend `cpu` packs: the matrices in the blocks."""
    return [
        p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks") and "pos" not in name
    ]


def step(kind: type[torch.optim.Optimizer], **options: object) -> Callable[[cast.CAST], None]:
    def change(model: cast.CAST) -> None:
        for p in matrices(model):
            p.grad = torch.ones_like(p)
        kind(matrices(model), lr=0.05, **options).step()  # type: ignore[call-arg]

    return change


def moving_average(model: cast.CAST) -> None:
    for p, new in zip(matrices(model), matrices(other(model)), strict=True):
        p.data.mul_(0.5).add_(new.data, alpha=0.5)


def copied_into_data(model: cast.CAST) -> None:
    for p, new in zip(matrices(model), matrices(other(model)), strict=True):
        p.data.copy_(new.data)


def vector(model: cast.CAST) -> None:
    """`vector_to_parameters` makes every parameter a view of one vector, which is then written."""
    flat = nn.utils.parameters_to_vector(matrices(model)).detach().clone()
    nn.utils.vector_to_parameters(flat, matrices(model))
    logits(model)
    flat.mul_(1.1)


def numpy_view(model: cast.CAST) -> None:
    for p in matrices(model):
        p.detach().numpy()[:] *= 1.1


def dlpack_view(model: cast.CAST) -> None:
    for p in matrices(model):
        torch.from_dlpack(p.detach()).mul_(1.1)


def one_element(model: cast.CAST) -> None:
    """A sum or a sample of the weights would hardly move."""
    weight = matrices(model)[0].detach().numpy()
    weight[-1, -1] += 3.0


def permuted(model: cast.CAST) -> None:
    """Any sum of the weights is what it was."""
    weight = matrices(model)[0].detach().numpy()
    weight[:] = weight[::-1].copy()


def merged_adapter(model: cast.CAST) -> None:
    """As adapter libraries merge: an in-place sum into `.data`."""
    for p in matrices(model):
        left = torch.randn(p.shape[0], 2, generator=torch.Generator().manual_seed(3))
        p.data += 0.1 * left @ torch.ones(2, p.shape[1])


def new_tensor_as_data(model: cast.CAST) -> None:
    for p, new in zip(matrices(model), matrices(other(model)), strict=True):
        p.data = new.data


def load_state_dict(model: cast.CAST) -> None:
    model.load_state_dict(other(model).state_dict())


def load_state_dict_assigned(model: cast.CAST) -> None:
    model.load_state_dict(other(model).state_dict(), assign=True)


def swapped(model: cast.CAST) -> None:
    for p, new in zip(matrices(model), matrices(other(model)), strict=True):
        torch.utils.swap_tensors(p, new)


def no_version(model: cast.CAST) -> None:
    """An autograd guard keeps the counter where it was."""
    for p in matrices(model):
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(p):
            p.mul_(1.1)


CHANGES: dict[str, Callable[[cast.CAST], None]] = {
    "AdamW": step(torch.optim.AdamW),
    "AdamW, fused": step(torch.optim.AdamW, fused=True),
    "SGD, fused": step(torch.optim.SGD, fused=True),
    "Adagrad, fused": step(torch.optim.Adagrad, fused=True),
    "moving average": moving_average,
    "copied into .data": copied_into_data,
    "a vector of parameters": vector,
    "NumPy": numpy_view,
    "DLPack": dlpack_view,
    "one element": one_element,
    "permuted rows": permuted,
    "merged adapter": merged_adapter,
    "another .data": new_tensor_as_data,
    "load_state_dict": load_state_dict,
    "load_state_dict, assign": load_state_dict_assigned,
    "swapped": swapped,
    "preserved version": no_version,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_call_uses_the_weights_as_they_are(change: Callable[[cast.CAST], None]) -> None:
    model = small()
    before = logits(model)
    assert torch.equal(logits(model), before)
    change(model)
    after = logits(model)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, unfused(model), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("conversion", ["bfloat16", "load_state_dict"])
def test_modules_convert_after_an_inference(conversion: str, swap: bool) -> None:
    """Swapping a module's parameters raises where anything holds a weak reference to one of them."""
    model = small()
    before = logits(model)
    former = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        if conversion == "bfloat16":
            model.to(torch.bfloat16).to(torch.float32)
        else:
            model.load_state_dict(other(model).state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(former)
    assert not torch.equal(logits(model), before)
    torch.testing.assert_close(logits(model), unfused(model), atol=2e-4, rtol=2e-4)


def _bytes_alive() -> int:
    gc.collect()
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in gc.get_objects() if _is_plain(x)}
    return sum(storages.values())


def _is_plain(x: object) -> bool:
    """Whether it is a tensor with memory of its own; `torch.func` wraps others, and an error keeps such wrappers."""
    if type(x) not in (Tensor, nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    return x.layout is torch.strided  # type: ignore[attr-defined]


def test_a_call_leaves_no_copy_of_the_weights_behind() -> None:
    model = small(windows=("space-time", "space-time"))
    video = small_video(model, dtype=torch.float32)
    before = _bytes_alive()
    with torch.no_grad():
        model(video)
    assert _bytes_alive() == before


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_block_holds_no_copy_until_backward(reentrant: bool) -> None:
    """Reentrant checkpointing calls without gradients first, as inference does."""
    module = randomise(BCAST(128, 64, num_heads=2, num_frames=2, num_patches=4, backend="cpu"))
    spatial, temporal = torch.randn(1, 2, 5, 128, requires_grad=True), torch.randn(1, 2, 4, 128, requires_grad=True)
    before = _bytes_alive()
    out = checkpoint(module, spatial, temporal, use_reentrant=reentrant)
    assert _bytes_alive() - before < sum(p.nbytes for p in module.parameters()) / 4
    sum(x.sum() for x in out).backward()
    assert spatial.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["mlp.fc1.weight", "t2s_cross.clip_time_pos", "S_Adapter.D_fc1.weight", "clip_ln_1.bias"]
)
def test_memory_that_was_freed_is_an_error(name: str, dtype: torch.dtype) -> None:
    """As sharding and offloading free it. The native core took an address of 0 for a tensor that is not there."""
    model = small().to(dtype)
    video = small_video(model, dtype=dtype)
    model.blocks[0].get_parameter(name).untyped_storage().resize_(0)
    with torch.no_grad(), pytest.raises(ValueError, match="has no memory: it was freed"):
        model(video)


def test_inference_tensors_are_read_at_every_call() -> None:
    with torch.inference_mode():
        model = small()
        before = logits(model)
        matrices(model)[0].mul_(2.0)
        assert not torch.equal(logits(model), before)


# --- other processes -------------------------------------------------------------------------------------------------


def _write_shared(shared: list[Tensor]) -> None:
    for x in shared:
        x.mul_(1.1)


def _broadcast(store: str, shapes: list[torch.Size]) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=2)
    for shape in shapes:
        torch.distributed.broadcast(torch.full(shape, 0.25), src=0)
    torch.distributed.destroy_process_group()


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process only."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("way", ["shared memory", "broadcast"])
def test_a_write_by_another_process_is_seen(way: str, tmp_path: object) -> None:
    model, spawn = small(), torch.multiprocessing.get_context("spawn")
    shared = [p.data for p in matrices(model)]
    if way == "shared memory":
        model.share_memory()
        before = logits(model)
        writer = spawn.Process(target=_write_shared, args=(shared,))
        writer.start()
    else:
        before = logits(model)
        store = f"{tmp_path}/store"
        writer = spawn.Process(target=_broadcast, args=(store, [x.shape for x in shared]))
        writer.start()
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=1, world_size=2)
        for x in shared:
            torch.distributed.broadcast(x, src=0)
        torch.distributed.destroy_process_group()
    writer.join()
    assert writer.exitcode == 0
    assert not torch.equal(logits(model), before)
    torch.testing.assert_close(logits(model), unfused(model), atol=2e-4, rtol=2e-4)


@pytest.mark.usefixtures("alone")
def test_sharded_parameters_are_gathered_anew_for_every_call() -> None:
    """FSDP2 gathers into the same memory of the same object, without a version."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, plain = small(), small()
    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, plain)]
    for _ in range(4):
        torch.testing.assert_close(logits(model), logits(plain))
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            run(m).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
