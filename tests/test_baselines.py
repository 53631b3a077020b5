"""The paper's other two-stream models: what they compute, what trains, what sees what, and how large they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from cast_models import SMALL, open_clip_model, randomise, small_model, small_video
from torch import Tensor, nn

import cast
from cast.baselines import DESIGNS, Design, Ensemble, SingleExpert, TwoStream, build
from cast.baselines.exchange import CrossAttention
from cast.model.config import make_config

HEADS = {"verb": 5, "noun": 4}
#: Designs that need no timm.
OWN = [name for name, design in DESIGNS.items() if "timm:" not in design.spatial]


def small(name: str, seed: int = 0, **overrides: Any) -> TwoStream:
    """A randomised fp64 model in evaluation mode."""
    return randomise(build(name, heads=HEADS, **(SMALL | overrides)), seed).double().eval()  # type: ignore[return-value]


def as_two_stream(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """CAST's names as TwoStream's."""
    names = [
        (r"blocks\.(\d+)\.clip_(.*)", r"spatial.expert.transformer.resblocks.\1.\2"),
        (r"clip_(.*)", r"spatial.expert.\1"),
        (r"vmae_(fc_norm.*)", r"temporal.expert.\1"),
        (r"(patch_embed.*|blocks\.\d+\.(?:norm|attn|mlp).*)", r"temporal.expert.\1"),
        (r"(blocks\.\d+)\.((?:cross|ln|t2s|s2t)_.*)", r"\1.exchange.bcast.\2"),
    ]

    def rename(key: str) -> str:
        return next((m.expand(new) for old, new in names if (m := re.fullmatch(old, key))), key)

    return {rename(key): tensor for key, tensor in weights.items()}


@pytest.mark.parametrize(
    "overrides",
    [
        {"heads": HEADS},
        {"heads": {"action": 7}, "directions": ("s2t",), "windows": ("space", "space-time"), "exchange_layers": (1,)},
        {"heads": HEADS, "directions": (), "positions": False},
    ],
)
def test_with_the_default_design_it_is_cast(overrides: dict[str, Any]) -> None:
    model = small_model(**overrides)
    other = TwoStream(config=model.config).double().eval()
    other.load_state_dict(as_two_stream(model.state_dict()))
    video = small_video(model)
    for head, logits in model(video).items():
        torch.testing.assert_close(other(video)[head], logits, rtol=1e-9, atol=1e-9)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert {key for key, p in other.named_parameters() if p.requires_grad} == set(as_two_stream(dict.fromkeys(trained)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OWN)
def test_gradients_reach_exactly_what_trains(name: str) -> None:
    model = small(name).train()
    video = small_video(model)
    logits = model(video)
    assert {head: tuple(values.shape) for head, values in logits.items()} == {"verb": (2, 5), "noun": (2, 4)}
    torch.stack([values.square().sum() for values in logits.values()]).sum().backward()
    for key, parameter in model.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached == (parameter.requires_grad and not goes_nowhere(key, model)), key


def goes_nowhere(key: str, model: TwoStream) -> bool:
    """In the last block nothing reads what an expert with CLS takes in: the exchange moves its patches, CLS is pooled.

    That holds for the published CAST too.
    """
    into_spatial, into_temporal = r"(bcast\.)?t2s|S_Cross", r"(bcast\.)?s2t|T_Cross"
    dead = [way for stream, way in ((model.spatial, into_spatial), (model.temporal, into_temporal)) if stream.prefix]
    return any(re.match(rf"blocks\.1\.exchange\.({way})", key) for way in dead)


#: Design -> does the verb depend on the spatial expert, and the noun on the temporal one?
SEES = {name: design.exchange != "none" or design.fusion != "apart" for name, design in DESIGNS.items() if name in OWN}


@pytest.mark.parametrize(("name", "sees"), SEES.items())
def test_streams_see_each_other_or_do_not(name: str, sees: bool) -> None:
    assert SEES["cast"]
    assert not SEES["independent"]
    model = small(name)
    video = small_video(model)
    before = model(video)
    randomise(model.spatial, 7)
    verb_moved = not torch.equal(model(video)["verb"], before["verb"])
    model = small(name)
    randomise(model.temporal, 7)
    noun_moved = not torch.equal(model(video)["noun"], before["noun"])
    assert (verb_moved, noun_moved) == (sees, sees)


@pytest.mark.parametrize("name", [name for name in OWN if DESIGNS[name].exchange != "none"])
def test_every_exchange_starts_as_the_identity(name: str) -> None:
    torch.manual_seed(0)
    design, config = DESIGNS[name], make_config(heads=HEADS, **SMALL)
    model = TwoStream(design, config).eval()
    apart = TwoStream(Design(**vars(design) | {"exchange": "none"}), config).eval()
    apart.load_state_dict({key: value for key, value in model.state_dict().items() if "exchange" not in key})
    video = small_video(model, dtype=torch.float32)
    for mine, theirs in zip(model.features(video), apart.features(video), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_the_lateral_sum_and_the_late_heads_by_hand() -> None:
    model = small("lateral")
    exchange = model.blocks[0].exchange
    spatial, temporal = (torch.randn(2, 3, tokens, 16, dtype=torch.float64) for tokens in (5, 4))
    new_spatial, new_temporal = exchange(spatial, temporal, (torch.tensor([0.0, 2.0]), None))
    assert torch.equal(new_spatial[0], spatial[0])
    assert torch.equal(new_spatial[:, :, 0], spatial[:, :, 0])
    torch.testing.assert_close(new_spatial[1, :, 1:], spatial[1, :, 1:] + 2 * exchange.t2s(temporal[1]))
    torch.testing.assert_close(new_temporal, temporal + exchange.s2t(spatial[:, :, 1:]))

    for name in ("late-add", "late-concat"):
        model = small(name)
        s, t = model.features(small_video(model))
        joined = s + t if name == "late-add" else model.head_projection(torch.cat((s, t), -1))
        torch.testing.assert_close(model(small_video(model))["noun"], model.head_noun(joined))


@pytest.mark.parametrize("window", ["time", "space", "space-time"])
def test_the_wide_cross_attention_against_a_loop(window: str) -> None:
    config = make_config(heads=HEADS, **SMALL)
    layer = randomise(CrossAttention(config, window)).double()
    asking, answering = (torch.randn(2, 3, 4, 16, dtype=torch.float64) for _ in range(2))
    tables = {side: sum(getattr(layer, f"{side}_{axis}_pos") for axis in window.split("-")) for side in ("q", "kv")}
    q, kv = layer.q(asking + tables["q"]), layer.kv(answering + tables["kv"])
    expected = torch.empty_like(asking)
    for b in range(2):
        for t in range(3):
            for n in range(4):
                group = [
                    (u, m) for u in range(3) for m in range(4)
                    if (window != "time" or m == n) and (window != "space" or u == t)
                ]  # fmt: skip
                keys = torch.stack([kv[b, u, m, :16] for u, m in group]).view(-1, 2, 8)
                values = torch.stack([kv[b, u, m, 16:] for u, m in group]).view(-1, 2, 8)
                share = torch.einsum("hd,khd->hk", q[b, t, n].view(2, 8), keys).div(8**0.5).softmax(-1)
                expected[b, t, n] = layer.proj(torch.einsum("hk,khd->hd", share, values).flatten())
    torch.testing.assert_close(layer(asking, answering), expected)


def test_cls_of_a_temporal_clip_goes_down_and_up_and_a_missing_cls_changes_nothing() -> None:
    model = small("clip-clip")
    exchange, bcast = model.blocks[0].exchange, model.blocks[0].exchange.bcast
    spatial, temporal = (torch.randn(2, 3, 5, 16, dtype=torch.float64) for _ in range(2))
    new_spatial, new_temporal = exchange(spatial, temporal, (None, None))
    expected_spatial, patches = bcast(spatial, temporal[:, :, 1:].contiguous())
    torch.testing.assert_close(new_spatial, expected_spatial)
    torch.testing.assert_close(new_temporal[:, :, 1:], patches)
    cls = temporal[:, :, :1]
    hidden = nn.functional.gelu(bcast.ln_t_cross(bcast.cross_t_down(cls)))
    torch.testing.assert_close(new_temporal[:, :, :1], cls + bcast.cross_t_up(hidden))

    exchange = small("videomae-videomae").blocks[0].exchange
    without, _ = exchange(spatial[:, :, 1:], temporal[:, :, 1:], (None, None))
    assert without.shape == (2, 3, 4, 16)
    with_cls, _ = exchange.bcast(spatial, temporal[:, :, 1:].contiguous())
    torch.testing.assert_close(without, with_cls[:, :, 1:])


def test_aim_s_third_adapter_carries_information_along_time_only() -> None:
    """Frame 5 of 6 moves the first frame's tokens with AIM's adapter, and not without it."""
    for adapters, moves in (("aim", True), ("cast", False)):
        model = randomise(SingleExpert("clip", adapters, heads=HEADS, **SMALL)).double().eval()  # type: ignore[arg-type]
        seen: list[Tensor] = []
        model.stream.pool = lambda x, seen=seen: seen.append(x) or x[:, :, 0].mean(1)  # type: ignore[method-assign]
        video = small_video(model)
        model(video)
        video[:, :, 5] += 1
        model(video)
        assert torch.equal(seen[0][:, 0], seen[1][:, 0]) != moves


def test_aim_s_adapter_over_time_by_hand() -> None:
    model = small("independent-adapters")
    block, adapter = model.spatial.block(0), model.blocks[0].S_Time_Adapter
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    attention = nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64)
    weights = {"in_proj_weight": block.attn.in_proj_weight, "in_proj_bias": block.attn.in_proj_bias}
    attention.load_state_dict(weights | {f"out_proj.{k}": v for k, v in block.attn.out_proj.state_dict().items()})
    normal = block.ln_1(x).transpose(1, 2).flatten(0, 1)
    mixed = attention(normal, normal, normal)[0].view(2, 5, 3, 16).transpose(1, 2)
    torch.testing.assert_close(model.spatial.attend_over_time(0, x, adapter), x + adapter(mixed))


@pytest.mark.filterwarnings("ignore:.*by its modules")
@pytest.mark.parametrize("name", ["independent-adapters", "b-cast" if "b-cast" in DESIGNS else OWN[-1]])
def test_every_layer_of_either_expert_is_called_where_it_must_be(name: str) -> None:
    """Hooks that halve what they see change what the plain model's halved weights change."""
    ours, same = small(name), small(name)
    last = {"norm1", "attn.proj", "mlp.fc2", "ln_1", "attn.out_proj", "mlp.c_proj", "D_fc2", "cross_s_up", "t2s_proj"}
    fired: list[str] = []

    def hook(name: str) -> Any:
        return lambda module, args, output: fired.append(name) or output / 2

    names = [key for key, _ in ours.named_modules() if any(key.endswith(f".{end}") for end in last)]
    for key in names:
        ours.get_submodule(key).register_forward_hook(hook(key))
        with torch.no_grad():
            for parameter in same.get_submodule(key).parameters():
                parameter.div_(2)
    got, want = ours(small_video(ours)), same(small_video(same))
    for head, logits in want.items():
        torch.testing.assert_close(got[head], logits)
    assert set(fired) == set(names)


def test_a_block_that_would_have_to_be_called_is_refused() -> None:
    model = small(OWN[0])
    handle = model.temporal.expert.blocks[1].register_forward_hook(lambda *_: None)
    with pytest.raises(
        TypeError, match=r"halves of an expert's block separately.*blocks\.1 has a forward hook.*on them"
    ):
        model(small_video(model))
    handle.remove()
    blocks = model.spatial.expert.transformer.resblocks
    blocks[0] = torch.compile(blocks[0], backend="eager")
    with pytest.raises(TypeError, match=r"resblocks\.0 is a .*OptimizedModule"):
        model(small_video(model))


def test_drop_path_drops_clips_and_only_while_training() -> None:
    model = small("lateral", drop_path=0.9)
    video = small_video(model, batch=6)
    assert torch.equal(model(video)["verb"], model(video)["verb"])
    model.train()
    assert not torch.equal(model(video)["verb"], model(video)["verb"])


@pytest.mark.parametrize(("trained", "drops"), [("all", True), ("new", False)])
def test_an_experts_own_branches_are_dropped_where_it_trains(trained: Literal["all", "new"], drops: bool) -> None:
    design = Design(exchange="none", adapters="none", trained=trained)
    model = (
        randomise(TwoStream(design, make_config(**(SMALL | {"heads": HEADS, "drop_path": 0.5}))), 0).double().train()
    )
    video = small_video(model, batch=6)
    assert torch.equal(model(video)["verb"], model(video)["verb"]) is not drops


# -- sizes


# -- single experts and ensembles


def test_an_ensemble_averages_probabilities() -> None:
    members = [
        randomise(SingleExpert(expert, heads=HEADS, **SMALL), seed).double().eval()
        for seed, expert in enumerate(("clip", "videomae"))
    ]
    video = torch.randn(2, 3, 6, 16, 16, dtype=torch.float64)
    mean = sum(member(video)["verb"].softmax(-1) for member in members) / 2
    torch.testing.assert_close(Ensemble(members)(video)["verb"].softmax(-1).double(), mean, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="no members"):
        Ensemble([])
    with pytest.raises(ValueError, match="they must agree"):
        Ensemble([members[0], SingleExpert("clip", heads={"action": 3}, **SMALL).double()])(video)


@pytest.mark.parametrize(("expert", "adapters"), [("clip", "aim"), ("videomae", "cast"), ("videomae", "none")])
def test_a_single_expert_trains_all_that_it_should(expert: str, adapters: Any) -> None:
    model = randomise(SingleExpert(expert, adapters, heads=HEADS, **SMALL)).double()
    torch.stack([logits.square().sum() for logits in model(small_video(model)).values()]).sum().backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, key


# -- weights


def test_own_experts_load_their_layouts() -> None:
    model = small("cast")
    clip, videomae = open_clip_model(), cast.TemporalExpert(**SMALL)
    model.load_experts(clip, randomise(videomae, 5))
    assert torch.equal(model.spatial.expert.ln_pre.weight.float(), clip.visual.ln_pre.weight)
    assert torch.equal(model.temporal.expert.patch_embed.proj.bias.float(), videomae.patch_embed.proj.bias)
    assert not torch.equal(model.temporal.expert.fc_norm.weight.float(), videomae.fc_norm.weight)


def test_mvd_s_positions_are_loaded_and_kept_and_elsewhere_refused() -> None:
    weights = {k: v for k, v in randomise(cast.TemporalExpert(**SMALL), 3).state_dict().items() if "fc_norm" not in k}
    table = torch.randn(1, 12, 16)
    student = weights | {"pos_embed": table, "pos_embed_img": table, "mask_token_vid": table, "down_img.weight": table}
    student |= {"decoder_vid.blocks.0.norm1.weight": table, "norm.weight": table[0, 0], "norm.bias": table[0, 0]}
    model = small("clip-mvd").load_experts(temporal={"model": student})
    assert torch.equal(model.temporal.expert.pos_embed.float(), table)
    assert "temporal.expert.pos_embed" in model.state_dict()
    with pytest.raises(ValueError, match="missing keys: pos_embed"):
        model.load_experts(temporal=weights)
    with pytest.raises(ValueError, match="unknown keys: pos_embed"):
        small("cast").load_experts(temporal={"model": student})


def test_saved_and_read_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomise(build("lateral", heads=HEADS, **SMALL)).eval()
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    again = TwoStream.from_pretrained(tmp_path)
    assert (again.design, again.config) == (model.design, model.config)
    video = small_video(again, dtype=torch.float32)
    assert torch.equal(again(video)["verb"], model(video)["verb"])
    small_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"names no design; a plain CAST is read by cast\.CAST\.from_pretrained"):
        TwoStream.from_pretrained(tmp_path)


# -- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exchange": "bcast"}, "exchange is 'bcast'; it must be one of none, b-cast, lateral"),
        ({"adapters": True}, "adapters is True"),
        ({"trained": "head"}, "trained is 'head'"),
        ({"fusion": "sum"}, "fusion is 'sum'"),
        ({"adapters": "aim", "spatial": "videomae"}, "adapters 'aim' are CLIP's; the spatial expert is 'videomae'"),
    ],
)
def test_bad_designs(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Design(**arguments)


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="unknown baseline 'late'; there are cast, independent"):
        build("late")
    with pytest.raises(ValueError, match="unknown expert 'dino'; there are clip, videomae, mvd, and timm:NAME"):
        TwoStream(Design(spatial="dino"), **SMALL)
    with pytest.raises(ValueError, match="the expert is 'videomae'"):
        SingleExpert("videomae", "aim", **SMALL)
