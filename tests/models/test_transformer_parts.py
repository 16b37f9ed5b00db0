"""A transformer's branches by tokens and by heads: the same network, less memory at the peak."""

from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.models.transformer_parts import attention_in_groups, mlp_in_chunks
from petra_zoo.reversible import LiveBytes
from petra_zoo.reversible.parts import parts_of
from tests.models.networks import difference
from tests.models.test_petra_revvit import DROPS, gradients, images, small
from tests.models.transformers import images as pictures
from tests.models.transformers import transformer


def block(**kwargs: Any) -> Block:
    torch.manual_seed(0)
    return Block(16, 4, qkv_bias=True, **kwargs).double()


def tokens() -> Tensor:
    return torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("groups", [2, 3, 9])
@pytest.mark.parametrize("kwargs", [{}, {"qk_norm": True, "init_values": 0.3, "proj_bias": False}])
def test_attention_in_groups_of_heads_is_attention(kwargs: dict[str, Any], groups: int) -> None:
    b, h = block(**kwargs), tokens()
    for fused in (True, False):
        b.attn.fused_attn = fused
        parted = attention_in_groups(b, groups)
        assert parted is not None
        assert parted.parts == min(groups, 4)
        torch.testing.assert_close(parted(h), b.ls1(b.attn(b.norm1(h))), rtol=1e-10, atol=1e-12)


def test_an_mlp_in_chunks_of_tokens_is_the_mlp() -> None:
    b, h = block(init_values=0.3), tokens()
    parted = mlp_in_chunks(b, 4)
    assert parted is not None
    torch.testing.assert_close(parted(h), b.ls2(b.mlp(b.norm2(h))), rtol=1e-10, atol=1e-12)


def test_layers_that_somebody_put_in_their_place_are_called_as_a_whole() -> None:
    class Adapted(nn.Linear):
        """Such as LoRA's."""

    adapted, gated, heard = block(), block(), block()
    adapted.attn.qkv = Adapted(16, 48).double()
    gated.attn = Attention(16, 4, gated=True).double()
    heard.attn.qkv.register_forward_hook(lambda *_: None)
    assert not any(attention_in_groups(b, 2) for b in (adapted, gated, heard))
    norm_over_all_tokens = block()
    norm_over_all_tokens.mlp = nn.Identity()
    assert mlp_in_chunks(norm_over_all_tokens, 2) is None
    assert attention_in_groups(block(), 1) is mlp_in_chunks(block(), 1) is None


def test_gradients_are_those_of_the_network_in_one_piece() -> None:
    whole, parted = small().train(), small(chunks=3).train()
    expected, found = gradients(whole, "plain", images()), gradients(parted, "reversible", images())
    assert max(difference(found[name], expected[name]) for name in expected) < 1e-11


def test_what_is_drawn_is_drawn_again() -> None:
    model = small(chunks=2, **DROPS).train()
    expected, found = (gradients(model, memory, images()) for memory in ("plain", "reversible"))
    assert torch.equal(found["out"], expected["out"])
    assert max(difference(found[name], expected[name]) for name in expected) < 1e-11


def test_a_branch_is_dropped_as_a_whole() -> None:
    """Stochastic depth: one number per image, however many parts there are."""
    b = block(drop_path=0.5).train()
    for parted in (attention_in_groups(b, 2), mlp_in_chunks(b, 4)):
        assert parted is not None
        torch.manual_seed(0)
        f = parted(tokens()[:1].expand(40, -1, -1))
        dropped = (f == 0).flatten(1)
        assert torch.equal(dropped.all(1), dropped.any(1))
        assert 5 < int(dropped.all(1).sum()) < 35


def peak(chunks: int) -> float:
    """Peak bytes of a reversible step through the body, in streams."""
    model = timm.create_model("petra_revvit_micro", embed_dim=32, depth=3, num_heads=8, mlp_ratio=4.0, chunks=chunks)
    x = torch.randn(8, 64, 32, requires_grad=True)
    with LiveBytes([x, *model.parameters()]) as memory:
        model.train().blocks(x).sum().backward()
    return memory.peak / x.nbytes


def test_chunks_lower_the_peak_of_a_step() -> None:
    whole, parted = peak(1), peak(8)
    assert parted < 0.75 * whole, (whole, parted)


@pytest.mark.parametrize("g", [1.0, 0.25])
@pytest.mark.parametrize("exact", [False, True])
def test_a_transformers_branches_are_coupled_in_parts(g: float, exact: bool) -> None:
    arguments = {"coupling": g, "gain": 1 + g, "units": "branch", "exact": exact, "drop_path_rate": 0.2}
    whole, parted = (transformer(**arguments, chunks=chunks).double().train() for chunks in (1, 3))
    expected, found = gradients(whole, "plain", pictures().double()), gradients(parted, "plain", pictures().double())
    assert max(difference(found[name], expected[name]) for name in expected) < (1e-2 if exact else 1e-11)
    back = gradients(parted, "reversible", pictures().double())
    assert torch.equal(back["out"], found["out"])
    assert max(difference(back[name], found[name]) for name in found) < 1e-9
    assert all(parts_of(unit.branch) > 1 for unit in parted.units()[1:-1])


def test_chunks_of_whole_blocks_are_refused() -> None:
    with pytest.raises(UserError, match="chunks=2 are of branches: use units='branch'"):
        transformer(chunks=2)


def test_parts_stay_whole_where_a_mask_is_taken() -> None:
    model = transformer(units="branch", chunks=2).train()
    mask = torch.ones(17, 17, dtype=torch.bool).tril()
    x = torch.randn(2, 17, 32)
    found = model.blocks(x, mask)
    model.blocks.chunks = 1
    torch.testing.assert_close(found, model.blocks(x, mask))
