"""Reversible vision transformers: timm's VisionTransformer whose blocks are one run of coupled blocks.

Same constructor, same parameter names, every name of timm's `vision_transformer` and `vision_transformer_hybrid` with
``petra_`` in front. A plain transformer's state dict loads and gives the plain transformer's function (coupling 0);
trained from scratch the coupling is 1. ``pretrained=True`` takes timm's weights and couples them while they load
(`transformer_weights.py`); ``coupling=0`` keeps their function.
"""

from collections.abc import Callable
from typing import Optional

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import vision_transformer, vision_transformer_hybrid
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from petra_zoo.models.layer_arguments import Argument
from petra_zoo.models.timm_twins import Family, rebound, register_twins
from petra_zoo.models.transformer import (
    Intermediates,
    Portion,
    ReversibleTransformer,
    check_scripted,
    scripted_merge,
    scripted_step,
)
from petra_zoo.models.transformer_weights import couple_as_loaded, couple_transformer
from petra_zoo.reversible import Unit

__all__ = ["PetraVit"]

STEM = ("patch_embed", "pos_drop", "patch_drop", "norm_pre")
HEAD = ("attn_pool", "fc_norm", "head_drop", "head", "head_dist")


def resampled(
    posemb: Tensor,
    new_size: list[int],
    old_size: Optional[list[int]] = None,  # noqa: UP045 - TorchScript
    num_prefix_tokens: int = 1,
) -> Tensor:
    """timm's resampling of position embeddings, called by this module: torch.fx wraps what the modules of a network's
    own forward call, and this function decides by sizes.
    """
    return resample_abs_pos_embed(posemb, new_size, old_size, num_prefix_tokens)


class PetraVit(ReversibleTransformer, VisionTransformer):
    """A reversible vision transformer.

    In train mode the forward stores no activations between its blocks; stem and head are recomputed from their input.

    Takes timm's `VisionTransformer` arguments, and those of `ReversibleTransformer`.
    """

    @torch.jit.ignore
    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's initialisation; the coupling becomes that of a newly built model."""
        super().init_weights(mode, needs_reset)
        self._reset_couplings()

    @torch.jit.ignore
    def load_pretrained(self, checkpoint_path: str, prefix: str = "") -> None:
        """timm's reader of JAX's checkpoints (.npz); the coupling becomes that of pretrained weights."""
        super().load_pretrained(checkpoint_path, prefix)
        couple_as_loaded(self)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        super().set_grad_checkpointing(enable)
        of_stem: Callable[[bool], None] | None = getattr(self.patch_embed, "set_grad_checkpointing", None)
        if of_stem is not None:  # a ResNet
            of_stem(enable)

    @torch.jit.ignore
    def units(self) -> list[Unit]:
        """Stem, blocks and head, in the order in which they run.

        Running them one after the other, from the same generator state, equals `model(x)` bit for bit.

        Raises:
            NotImplementedError: a subclass has features of its own, which the units would leave out.
        """
        return self._all_units()

    @torch.jit.unused
    def _all_units(self) -> list[Unit]:
        return self._list_units(Portion(self.embed, STEM), Portion(self.forward_head, HEAD))

    _pos_embed = rebound(VisionTransformer._pos_embed, resample_abs_pos_embed=resampled)

    def embed(self, x: Tensor) -> Tensor:
        """Tokens [B, N, C] of images [B, C, H, W], prefix tokens first."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))

    def forward_features(
        self,
        x: Tensor,
        attn_mask: Optional[Tensor] = None,  # noqa: UP045 - TorchScript
        is_causal: bool = False,
    ) -> Tensor:
        x = self.embed(x)
        if torch.jit.is_scripting():
            g, s = float(self.blocks.coupling), float(self.blocks.gain)
            check_scripted(self.blocks.unit_kind, self.blocks.grid, g)
            a: Optional[Tensor] = None  # noqa: UP045
            for block in self.blocks:
                b = scripted_step(x, block(x, attn_mask=attn_mask, is_causal=is_causal), a, g, s)
                a = x
                x = b
            x = scripted_merge(x, a, g)
        elif attn_mask is None and not is_causal:
            x = self.blocks(x)  # as timm does: a block that somebody has put there may take nothing else
        else:
            x = self.blocks(x, attn_mask, is_causal)
        return self.norm(x)

    def forward(
        self,
        x: Tensor,
        attn_mask: Optional[Tensor] = None,  # noqa: UP045
        is_causal: bool = False,
    ) -> Tensor:
        if not torch.jit.is_scripting():
            if attn_mask is None and not is_causal and self._goes_by_units(x):
                return self._by_units(x)
        return self.forward_head(self.forward_features(x, attn_mask=attn_mask, is_causal=is_causal))

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
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Argument:
        """timm's forward_intermediates; what is taken behind a block are its merged streams."""
        options = Intermediates(
            indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only, output_dict
        )
        masked = () if attn_mask is None and not is_causal else (attn_mask, is_causal)
        return self._intermediates(self.embed(x), x, options, *masked)


for _source, _builder in (
    (vision_transformer, "_create_vision_transformer"),
    (vision_transformer_hybrid, "_create_vision_transformer_hybrid"),
):
    register_twins(__name__, Family(_source, _builder, {VisionTransformer: PetraVit}, couple_transformer))
