"""Reversible EVA: timm's Eva (EVA-02, DINOv3, Perception Encoder, ROPE-ViT, ...) whose blocks are one run.

Every name of timm's `eva` with ``petra_`` in front; see `petra_vit.py`. Blocks take a rotary position embedding beside
their tokens, which gets gradients where its frequencies are learned.
"""

from collections.abc import Sequence
from functools import partial
from typing import Optional

import torch
from timm.models import eva
from timm.models.eva import Eva, EvaBlock
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.models.branches import ATTENTION, Branch, register_branches
from petra_zoo.models.layer_arguments import Argument
from petra_zoo.models.reversible_sequential import ReversibleSequential
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

__all__ = ["PetraEva"]

STEM = ("patch_embed", "pos_drop", "patch_drop", "norm_pre")
HEAD = ("attn_pool", "fc_norm", "head_drop", "head")


def _attention(
    block: EvaBlock,
    h: Tensor,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    attended: Tensor = block.attn(block.norm1(h), rope=rope, attn_mask=attn_mask, is_causal=is_causal)
    return block.drop_path1(attended if block.gamma_1 is None else block.gamma_1 * attended)


def _mlp(block: EvaBlock, h: Tensor, *_: Argument) -> Tensor:
    f: Tensor = block.mlp(block.norm2(h))
    return block.drop_path2(f if block.gamma_2 is None else block.gamma_2 * f)


def _branches(block: nn.Module) -> Sequence[tuple[str, Branch]]:
    assert isinstance(block, EvaBlock)
    return ("attn", partial(_attention, block)), ("mlp", partial(_mlp, block))


register_branches(EvaBlock, _branches, {"attn": ATTENTION})


class EachItsRotation(ReversibleSequential):
    """Blocks with a rotary embedding of their own each: all of them are [depth, ...]."""

    @torch.jit.unused
    def arguments(
        self, name: str, shared: tuple[Argument, ...], named: dict[str, Argument]
    ) -> tuple[tuple[Argument, ...], dict[str, Argument]]:
        rotations, *others = shared
        return (rotations if rotations is None else rotations[int(name)], *others), named


class PetraEva(ReversibleTransformer, Eva):
    """A reversible Eva; stores no activations between its blocks in train mode.

    Takes timm's `Eva` arguments, and those of `ReversibleTransformer`.
    """

    @torch.jit.unused
    def _container(self) -> type[ReversibleSequential]:
        return EachItsRotation if self.rope_mixed else ReversibleSequential

    def init_weights(self, needs_reset: bool = True) -> None:
        """timm's initialisation; the coupling becomes that of a newly built model."""
        super().init_weights(needs_reset)
        self._reset_couplings()

    @torch.jit.ignore
    def units(self) -> list[Unit]:
        """Stem, blocks and head; see `PetraVit.units`. Each block makes the rotary embedding anew.

        Raises:
            NotImplementedError: a subclass has features of its own, which the units would leave out.
            UserError: in training, the rotary embedding is random, so that blocks cannot make it anew.
        """
        self._check_rotation()
        reads = {} if self.rope is None else {"rope": self.rope}
        return self._list_units(Portion(self._embed_own, STEM), Portion(self.forward_head, HEAD), self._rotation, reads)

    @torch.jit.unused
    def _embed_own(self, x: Tensor) -> Tensor:
        """`embed` of images of the network's own size: blocks that see tokens alone know the grid by nothing else."""
        own = self.patch_embed.img_size
        if self.rope is not None and self.dynamic_img_size and own is not None and tuple(x.shape[-2:]) != tuple(own):
            size, expected = ("x".join(map(str, shape)) for shape in (x.shape[-2:], own))
            raise UserError(
                f"units() of this network are for images of {expected}, not {size}: call "
                f"set_input_size(img_size={tuple(x.shape[-2:])}) first"
            )
        return self.embed(x)

    @torch.jit.unused
    def _check_rotation(self) -> None:
        random = "patch_drop_rate" if self.patch_drop is not None else "rope_*_coords"
        if self.rope is not None and self.rope.training and (self.patch_drop is not None or self.rope.aug_active):
            raise UserError(
                f"{random} makes one rotary embedding per step, which has no place in the streams between units: train "
                f"the network as a whole, or leave {random} out"
            )

    @torch.jit.unused
    def _rotation(self) -> tuple[Argument, ...]:
        self._check_rotation()  # units may have been listed in eval mode
        rope: Argument = self.rope
        if rope is None:
            return (None,)
        if self.dynamic_img_size or not hasattr(rope, "feat_shape"):
            return (rope.get_embed(shape=self.patch_embed.grid_size),)
        return (rope.get_embed(),)

    def embed(self, x: Tensor) -> Tensor:
        """Tokens [B, N, C] of images [B, C, H, W], prefix tokens first."""
        return self.norm_pre(self._pos_embed(self.patch_embed(x))[0])

    def forward_features(
        self,
        x: Tensor,
        attn_mask: Optional[Tensor] = None,  # noqa: UP045 - TorchScript
        is_causal: bool = False,
    ) -> Tensor:
        x, rope = self._pos_embed(self.patch_embed(x))
        x = self.norm_pre(x)
        if torch.jit.is_scripting():
            g, s = float(self.blocks.coupling), float(self.blocks.gain)
            check_scripted(self.blocks.unit_kind, self.blocks.grid, g)
            a: Optional[Tensor] = None  # noqa: UP045
            for i, block in enumerate(self.blocks):
                rotation = rope
                if self.rope_mixed and rope is not None:
                    rotation = rope[i]
                b = scripted_step(x, block(x, rope=rotation, attn_mask=attn_mask, is_causal=is_causal), a, g, s)
                a = x
                x = b
            x = scripted_merge(x, a, g)
        else:
            x = self.blocks(x, rope, attn_mask, is_causal)
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
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Argument:
        """timm's forward_intermediates; what is taken behind a block are its merged streams."""
        options = Intermediates(indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only)
        tokens, rope = self._pos_embed(self.patch_embed(x))
        return self._intermediates(self.norm_pre(tokens), x, options, rope, attn_mask, is_causal)


register_twins(__name__, Family(eva, "_create_eva", {Eva: PetraEva}, couple_transformer))
