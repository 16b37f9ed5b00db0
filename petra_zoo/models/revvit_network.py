"""Reversible vision transformers (Mangalam et al., CVPR 2022, arXiv 2302.04869): timm's with two streams in their body.

The tokens enter both streams; attention and MLP of every block couple them at g = 1 (`two_stream_blocks.py`); behind
the last block they are concatenated, so that norm, pooling and classifier are twice as wide as the blocks. There is no
class token unless one is asked for.

Stochastic depth draws a mask per branch, as timm's transformers do, where the published code has attention and MLP of
a block share one. In PETRA random numbers belong to a unit and a micro-batch, so that any two units may lie in two
processes; a shared mask would have to travel. Each branch is dropped as often either way.
"""

from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from timm.layers import LayerNorm, get_device_dtype, get_norm_layer
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.models.layer_arguments import Argument
from petra_zoo.models.memory_modes import Memory, MemoryModes
from petra_zoo.models.revvit_weights import from_published, is_published
from petra_zoo.models.transformer import Intermediates, OwnParameters, as_asked
from petra_zoo.models.two_stream_blocks import TwoStreamBlock, TwoStreamBlocks
from petra_zoo.reversible import FunctionUnit, StreamKind, Streams, Unit
from petra_zoo.reversible.parts import check_chunks
from petra_zoo.reversible.stream_type import check_kind


class PetraRevViT(MemoryModes, VisionTransformer):
    """A reversible vision transformer.

    In train mode the forward stores no activations of the body; patch embedding and head are recomputed.

    Args:
        num_classes: 0: no classifier.
        embed_dim: C, of one stream; features have 2C channels.
        global_pool: timm's; not one of those with parameters of their own (`map`, `prr`).
        class_token: timm's.
        fc_norm: the norm behind the pooling instead of in front of it.
        final_norm: timm's.
        norm_layer: of the last norm and the blocks'; None: LayerNorm with eps 1e-6.
        weight_init: timm's.
        streams: what carries the streams, see `set_streams`.
        chunks: in how many parts a block's branches are evaluated, the MLP by tokens, the attention by heads: less
            memory at the peak of a reversible step, and the same gradients but for their rounding.
        **kwargs: timm's `VisionTransformer` arguments.

    Raises:
        UserError: a pooling with parameters, or streams on a grid.
    """

    if TYPE_CHECKING:
        blocks: TwoStreamBlocks

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        embed_dim: int = 768,
        global_pool: str = "avg",
        class_token: bool = False,
        fc_norm: bool | None = False,
        final_norm: bool = True,
        norm_layer: Argument = None,
        weight_init: Literal["skip", "reset", "jax", "jax_nlhb", "moco", ""] = "",
        streams: StreamKind = "auto",
        chunks: int = 1,
        **kwargs: Argument,
    ) -> None:
        _check_pool(global_pool)
        init: Argument = super().__init__  # timm's annotations narrow the words that it takes
        init(
            num_classes=0,
            embed_dim=embed_dim,
            global_pool=global_pool,
            class_token=class_token,
            final_norm=False,
            norm_layer=norm_layer,
            weight_init="skip",
            block_fn=TwoStreamBlock,
            **kwargs,
        )
        self.blocks = TwoStreamBlocks(*self.blocks)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = 2 * embed_dim
        for info in self.feature_info:
            info["num_chs"] = self.num_features
        dd = get_device_dtype(self)
        norm = partial(get_norm_layer(norm_layer) or LayerNorm, self.num_features, **dd)
        behind_pool = global_pool in ("avg", "avgmax", "max") if fc_norm is None else fc_norm
        self.norm = norm() if final_norm and not behind_pool else nn.Identity()
        self.fc_norm = norm() if final_norm and behind_pool else nn.Identity()
        self.head = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self._use_streams(streams)
        for block in self.blocks:
            block.chunks = check_chunks(chunks)
        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    # -- settings -------------------------------------------------------------------------------------------------

    @torch.jit.ignore
    def set_memory(self, memory: Memory) -> None:
        super().set_memory(memory)
        self.blocks.memory = memory

    @torch.jit.unused
    def _use_streams(self, streams: StreamKind) -> None:
        if streams == "fixed16":
            raise UserError("streams=fixed16 is not for petra_revvit*, which have no grid: use bfloat16")
        for block in self.blocks:
            block.kind = check_kind(streams)

    @torch.jit.unused
    def choose_grids(self, images: Tensor, headroom: float = 4.0) -> None:
        """Refused: there is no grid.

        Raises:
            UserError: always.
        """
        raise UserError("petra_revvit* have no grid of streams to choose: streams=bfloat16 is their 16 bits")

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for `num_classes` (0: none); `global_pool` None keeps the pooling, '' removes it."""
        if global_pool is not None:
            _check_pool(global_pool)
        reset: Argument = super().reset_classifier
        reset(0, global_pool)  # all but the classifier, which is as wide as both streams
        self.num_classes = num_classes
        if num_classes > 0:
            self.head = nn.Linear(self.num_features, num_classes, **get_device_dtype(self)).train(self.training)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Argument) -> None:
        if not prefix and is_published(state_dict):
            ours = from_published(state_dict)
            state_dict.clear()
            state_dict.update(ours)
        super()._load_from_state_dict(state_dict, prefix, *args)

    # -- forward --------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if not torch.jit.is_scripting():  # TorchScript compiles this test away, and the rest with it
            if attn_mask is None and not is_causal and self._goes_by_units(x):
                return self._forward_units(x)
        return self.forward_head(self.forward_features(x, attn_mask, is_causal))

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Both streams behind the last block, concatenated and normalised: [B, N, 2C]."""
        return self.norm(self.blocks(self._embed(x), attn_mask, is_causal))

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
        """timm's forward_intermediates, of both streams behind every block: [B, 2C, H, W] or [B, N, 2C]."""
        options = Intermediates(
            indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only, output_dict
        )
        take, last = feature_take_indices(len(self.blocks), indices)
        blocks = self.blocks[: last + 1] if stop_early else self.blocks
        *found, final = blocks.features(self._embed(x), take, attn_mask, is_causal)
        return as_asked(self, found, final, x, options)

    def _embed(self, x: Tensor) -> Tensor:
        """Tokens [B, N, C] of images, with their positions."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))

    # -- units ----------------------------------------------------------------------------------------------------

    @torch.jit.ignore
    def units(self) -> list[Unit]:
        """Patch embedding, attention and MLP of every block, and head, in the order in which they run.

        Raises:
            NotImplementedError: a subclass has features of its own, which the units would leave out.
        """
        self._check_units()
        stem = {name: getattr(self, name) for name in ("patch_embed", "pos_drop", "patch_drop", "norm_pre")}
        head = {name: getattr(self, name) for name in ("norm", "fc_norm", "head_drop", "head")}
        units = [
            FunctionUnit("stem", lambda x: (self.blocks.enter(self._embed(x)),), {**stem, "bare": OwnParameters(self)}),
            *self.blocks.units("blocks"),
            FunctionUnit("head", self._head, head),
        ]
        for unit in units:
            unit.outside = (self,)
        return units

    @torch.jit.unused
    def _head(self, *streams: Tensor) -> Streams:
        return (self.forward_head(self.norm(self.blocks.join(*streams))),)

    @torch.jit.unused
    def _forward_units(self, x: Tensor) -> Tensor:
        return self._run_units(self.units(), x)[0]


def _check_pool(global_pool: str) -> None:
    if global_pool in ("map", "prr"):
        raise UserError(f"global_pool={global_pool} attends to C channels, and both streams have 2C: use avg")
