"""The reversible vision transformers: their size, their function, the published weights, and timm's contract."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import petra_zoo  # noqa: F401 - registers the models
from petra_zoo.errors import UserError
from petra_zoo.models import PetraRevViT
from petra_zoo.models.two_stream_blocks import TwoStreamBlocks
from petra_zoo.reversible import LiveBytes
from tests.models.networks import difference

SMALL: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
MODES = ("reversible", "recompute")
DROPS = {"drop_rate": 0.1, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "pos_drop_rate": 0.1, "drop_path_rate": 0.3}


def small(dtype: torch.dtype = torch.float64, **kwargs: Any) -> PetraRevViT:
    torch.manual_seed(0)
    model = timm.create_model("petra_revvit_micro", **{**SMALL, **kwargs}).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # no branch is almost zero
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype))
    return model


def images(n: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def gradients(model: nn.Module, memory: str, x: Tensor) -> dict[str, Tensor]:
    model.set_memory(memory)
    model.zero_grad()
    torch.manual_seed(3)
    out = model(x)
    out.square().sum().backward()
    return {"out": out.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def by_hand(model: PetraRevViT, x: Tensor) -> Tensor:
    """The published formula: Y1 = X1 + Attention(X2), Y2 = X2 + MLP(Y1), from X1 = X2; concatenate, norm, mean."""
    tokens = model.patch_embed(x) + model.pos_embed
    x1, x2 = tokens, tokens
    for block in model.blocks:
        y1 = x1 + block.attn(block.norm1(x2))
        y2 = x2 + block.mlp(block.norm2(y1))
        x1, x2 = y1, y2
    return model.head(model.norm(torch.cat([x1, x2], -1)).mean(1))


@pytest.mark.parametrize(("name", "rows_of_no_use"), [("small", 22_435_432), ("base", 87_337_192)])
def test_it_has_the_published_number_of_parameters(name: str, rows_of_no_use: int) -> None:
    """The counts that are quoted hold 2C more: a class token and its position, which meet no image."""
    model = timm.create_model(f"petra_revvit_{name}", device="meta")
    assert sum(p.numel() for p in model.parameters()) == rows_of_no_use - 2 * model.embed_dim


def test_it_computes_the_published_formula() -> None:
    model = small().eval()
    torch.testing.assert_close(model(images()), by_hand(model, images()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("memory", "drops"), [("reversible", DROPS), *(pytest.param(m, {}, marks=pytest.mark.slow) for m in MODES)]
)
def test_gradients_are_those_of_plain_backpropagation(memory: str, drops: dict[str, float]) -> None:
    model = small(depth=6, **drops).train()
    expected, found = (gradients(model, m, images()) for m in ("plain", memory))
    assert torch.equal(found["out"], expected["out"])
    assert max(difference(found[name], expected[name]) for name in expected) < 1e-11


def test_its_units_compute_what_it_computes_to_the_bit() -> None:
    for training in (True, False):
        model = small(torch.float32, **DROPS).train(training)
        torch.manual_seed(3)
        expected = model(images(dtype=torch.float32))
        torch.manual_seed(3)
        streams: tuple[Tensor, ...] = (images(dtype=torch.float32),)
        for unit in model.units():
            streams = unit(*streams)
        assert torch.equal(streams[0], expected)


@pytest.mark.parametrize("streams", ["float32", "bfloat16"])
def test_the_plain_path_computes_the_same_bits_whatever_carries_the_streams(streams: Any) -> None:
    model = small(torch.float32, streams=streams).train()
    x = images(dtype=torch.float32)
    plain, reversible = (gradients(model, memory, x)["out"] for memory in ("plain", "reversible"))
    assert torch.equal(plain, reversible)
    with torch.autocast("cpu", torch.bfloat16):
        plain, reversible = (gradients(model, memory, x)["out"] for memory in ("plain", "reversible"))
    assert torch.equal(plain, reversible)


def test_a_unit_holds_its_own_parameters_alone() -> None:
    model = small(class_token=True, reg_tokens=2)
    held = [p for unit in model.units() for p in unit.parameters()]
    assert len(held) == len(set(held))
    assert set(held) == set(model.parameters())
    assert [unit.name for unit in model.units()][:3] == ["stem", "blocks.0.attn", "blocks.0.mlp"]


def test_weights_in_the_place_of_its_own_get_the_gradients() -> None:
    model = small().train()
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    out = torch.func.functional_call(model, weights, images())
    found = torch.autograd.grad(out.sum(), [weights["pos_embed"], weights["blocks.1.mlp.fc1.weight"]])
    model.set_memory("plain")
    out = torch.func.functional_call(model, weights, images())
    expected = torch.autograd.grad(out.sum(), [weights["pos_embed"], weights["blocks.1.mlp.fc1.weight"]])
    assert all(difference(a, b) < 1e-11 for a, b in zip(found, expected, strict=True))


def test_its_body_saves_memory_for_whoever_calls_it() -> None:
    """`vit.blocks(tokens)`: what is stored does not grow with depth."""
    stored = {}
    for depth in (3, 6):
        model = small(torch.float32, depth=depth).train()
        tokens = torch.randn(8, 4, 16, requires_grad=True)
        with LiveBytes([tokens, *model.parameters()]) as memory:
            out = model.blocks(tokens)
            stored[depth] = memory.now
        out.sum().backward()
        assert tokens.grad is not None
    assert stored[3] == stored[6]


def test_a_slice_of_its_body_is_one() -> None:
    model = small().eval()
    model.blocks.memory = "recompute"
    part = model.blocks[1:]
    assert isinstance(part, TwoStreamBlocks)
    assert (part.memory, part.training, list(part)) == ("recompute", False, list(model.blocks)[1:])


def test_intermediates_are_both_streams_behind_each_block() -> None:
    model = small(class_token=True).train()
    final, taps = model.forward_intermediates(images(), norm=True, output_fmt="NLC", return_prefix_tokens=True)
    assert [tap.shape for tap, _ in taps] == [(4, 4, 32)] * 3
    whole = torch.cat([taps[-1][1], taps[-1][0]], 1)
    assert torch.equal(whole, final)
    assert torch.equal(final, model.forward_features(images()))
    (tap,) = model.eval().forward_intermediates(images(), [1], stop_early=True, intermediates_only=True)
    assert tap.shape == (4, 32, 2, 2)
    found = model.forward_intermediates(images(), [0, 2], output_dict=True)
    assert set(found) == {"image_intermediates", "image_features"}


def test_a_mask_is_seen_by_every_attention() -> None:
    model = small().train()
    causal = model(images(), is_causal=True)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    torch.testing.assert_close(model(images(), attn_mask=mask), causal)
    assert not torch.allclose(model(images()), causal)


def test_a_new_classifier_is_as_wide_as_both_streams() -> None:
    model = small()
    model.reset_classifier(7)
    assert model(images()).shape == (4, 7)
    model.reset_classifier(0, "")
    assert model(images()).shape == (4, 4, 32)
    assert model.num_features == model.head_hidden_size == 32


def test_what_does_not_go_with_two_streams_is_refused() -> None:
    with pytest.raises(UserError, match="global_pool=map attends to C channels"):
        small(global_pool="map")
    with pytest.raises(UserError, match="fixed16 is not for petra_revvit"):
        small(streams="fixed16")


# -- the published weights ----------------------------------------------------------------------------------------


def published(model: PetraRevViT) -> dict[str, Any]:
    """A model's weights in the layout of pyslowfast's checkpoints."""
    state: dict[str, Tensor] = {}
    for name, value in copy.deepcopy(model.state_dict()).items():
        for ours, theirs in (("norm1", "F.norm"), ("norm2", "G.norm"), (".attn.", ".F.attn."), (".mlp.", ".G.mlp.")):
            name = name.replace(ours, theirs)
        name = name.replace("blocks.", "rev_backbone.layers.").replace("head.", "head.projection.")
        if "qkv" in name:
            state |= {name.replace("qkv", key): x.clone() for key, x in zip("qkv", value.chunk(3), strict=True)}
        else:
            state[name] = value
    return {"epoch": 299, "model_state": state, "optimizer_state": {"state": {}}, "cfg": "MVIT:\n  DEPTH: 3\n"}


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "REV_VIT_S.pyth"
    torch.save(published(small(torch.float32)), path)
    return str(path)


def test_published_names_are_the_published_ones() -> None:
    names = published(small())["model_state"]
    expected = {"patch_embed.proj.weight", "pos_embed", "norm.weight", "head.projection.bias"}
    block = {"F.norm.weight", "F.attn.q.weight", "F.attn.k.bias", "F.attn.v.weight", "F.attn.proj.weight"}
    block |= {"G.norm.bias", "G.mlp.fc1.weight", "G.mlp.fc2.bias"}
    assert expected | {f"rev_backbone.layers.2.{name}" for name in block} <= set(names)


def test_a_published_file_loads_exactly(file: str) -> None:
    source = small(torch.float32).eval()
    x = images(dtype=torch.float32)
    as_pretrained = {"pretrained": True, "pretrained_cfg_overlay": {"file": file, "num_classes": 5}}
    for how in ({"checkpoint_path": file}, as_pretrained):
        model = timm.create_model("petra_revvit_micro", **SMALL, **how).eval()
        assert torch.equal(model(x), source(x)), how
    blank = timm.create_model("petra_revvit_micro", **SMALL).eval()
    blank.load_state_dict(torch.load(file, weights_only=True)["model_state"])
    assert torch.equal(blank(x), source(x))


def test_published_weights_are_fitted_to_other_sizes_and_classes(file: str) -> None:
    model = timm.create_model(
        "petra_revvit_micro",
        **{**SMALL, "img_size": 16, "num_classes": 3, "in_chans": 1},
        pretrained=True,
        pretrained_cfg_overlay={"file": file, "num_classes": 5},
    )
    assert model(torch.randn(2, 1, 16, 16)).shape == (2, 3)


def test_published_weights_of_another_size_are_an_error(file: str) -> None:
    with pytest.raises(RuntimeError, match="Missing key"):
        timm.create_model("petra_revvit_micro", **{**SMALL, "depth": 4}, checkpoint_path=file)
