"""Reversible BEiT: timm's Beit whose blocks are one run.

Every name of timm's `beit` with ``petra_`` in front; see `petra_vit.py`. A relative position bias that all blocks share
is passed to each of them, and gets the sum of their gradients.
"""

from collections.abc import Sequence
from functools import partial

import torch
from timm.models import beit
from timm.models.beit import Beit, Block
from torch import Tensor, nn

from petra_zoo.models.branches import ATTENTION, Branch, register_branches
from petra_zoo.models.layer_arguments import Argument
from petra_zoo.models.timm_twins import Family, register_twins
from petra_zoo.models.transformer import (
    Intermediates,
    Portion,
    ReversibleTransformer,
    check_scripted,
    scripted_merge,
    scripted_step,
)
from petra_zoo.models.transformer_weights import couple_transformer
from petra_zoo.reversible import Unit

__all__ = ["PetraBeit"]

STEM = ("patch_embed", "pos_drop")
HEAD = ("fc_norm", "head_drop", "head")


def _attention(block: Block, h: Tensor, bias: Tensor | None = None) -> Tensor:
    attended: Tensor = block.attn(block.norm1(h), shared_rel_pos_bias=bias)
    return block.drop_path1(attended if block.gamma_1 is None else block.gamma_1 * attended)


def _mlp(block: Block, h: Tensor, bias: Tensor | None = None) -> Tensor:
    f: Tensor = block.mlp(block.norm2(h))
    return block.drop_path2(f if block.gamma_2 is None else block.gamma_2 * f)


def _branches(block: nn.Module) -> Sequence[tuple[str, Branch]]:
    assert isinstance(block, Block)
    return ("attn", partial(_attention, block)), ("mlp", partial(_mlp, block))


register_branches(Block, _branches, {"attn": ATTENTION})


class PetraBeit(ReversibleTransformer, Beit):
    """A reversible BEiT; stores no activations between its blocks in train mode.

    Takes timm's `Beit` arguments, and those of `ReversibleTransformer`.
    """

    def init_weights(self, needs_reset: bool = True) -> None:
        """timm's initialisation; the coupling becomes that of a newly built model."""
        super().init_weights(needs_reset)
        self._reset_couplings()

    @torch.jit.ignore
    def units(self) -> list[Unit]:
        """Stem, blocks and head; see `PetraVit.units`. Each block makes a shared position bias anew.

        Raises:
            NotImplementedError: a subclass has features of its own, which the units would leave out.
        """
        reads = {} if self.rel_pos_bias is None else {"rel_pos_bias": self.rel_pos_bias}
        return self._list_units(Portion(self.embed, STEM), Portion(self.forward_head, HEAD), self._bias, reads)

    @torch.jit.unused
    def _bias(self) -> tuple[Argument, ...]:
        return (None if self.rel_pos_bias is None else self.rel_pos_bias(),)

    def embed(self, x: Tensor) -> Tensor:
        """Tokens [B, N, C] of images [B, C, H, W], the class token first."""
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        return self.pos_drop(x)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        bias = self.rel_pos_bias() if self.rel_pos_bias is not None else None
        if torch.jit.is_scripting():
            g, s = float(self.blocks.coupling), float(self.blocks.gain)
            check_scripted(self.blocks.unit_kind, self.blocks.grid, g)
            a: Tensor | None = None
            for block in self.blocks:
                b = scripted_step(x, block(x, shared_rel_pos_bias=bias), a, g, s)
                a = x
                x = b
            x = scripted_merge(x, a, g)
        else:
            x = self.blocks(x, bias)
        return self.norm(x)

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Argument:
        """timm's forward_intermediates; what is taken behind a block are its merged streams."""
        options = Intermediates(indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only)
        return self._intermediates(self.embed(x), x, options, *self._bias())


register_twins(__name__, Family(beit, "_create_beit", {Beit: PetraBeit}, couple_transformer))
