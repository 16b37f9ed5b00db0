"""timm's vision transformer as one run of coupled units: a reversible one with its parameters, to be measured."""

from __future__ import annotations

from collections.abc import Callable

from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from petra_zoo.models.memory_modes import Memory
from petra_zoo.reversible import CoupledUnit, StreamKind, Streams, StreamType, backpropagate, merge


class ReversibleViT(nn.Module):
    """Attention and MLP of every block are units of one run with g = 1 and act = identity.

    Args:
        vit: timm's network; its modules are used, not copied.
        memory: ``'plain'`` or ``'reversible'``.
        streams: what carries them.
    """

    def __init__(self, vit: VisionTransformer, memory: Memory, streams: StreamKind) -> None:
        super().__init__()
        self.vit, self.memory = vit, memory
        self.streams = StreamType(kind=streams)
        self._units = [unit for block in vit.blocks for unit in self._units_of(block)]
        self._units[0].starts = True

    def _units_of(self, block: nn.Module) -> list[CoupledUnit]:
        assert isinstance(block, Block)

        def attend(h: Tensor) -> Tensor:
            return block.drop_path1(block.ls1(block.attn(block.norm1(h))))

        def think(h: Tensor) -> Tensor:
            return block.drop_path2(block.ls2(block.mlp(block.norm2(h))))

        return [
            self._unit(attend, block.norm1, block.attn, block.ls1, block.drop_path1),
            self._unit(think, block.norm2, block.mlp, block.ls2, block.drop_path2),
        ]

    def _unit(self, branch: Callable[[Tensor], Tensor], *modules: nn.Module) -> CoupledUnit:
        return CoupledUnit(
            "unit",
            nn.ModuleList(modules),
            branch=branch,
            activate=lambda b: b,
            coupling=_coupling,
            streams=self.streams,
        )

    def forward(self, x: Tensor) -> Tensor:
        vit = self.vit
        tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))
        streams = self.streams.now(_coupling, vit)
        b, a = self._run((streams.enter(tokens),))
        return vit.forward_head(vit.norm(merge(streams.read(b), streams.read(a), 1.0)))

    def _run(self, streams: Streams) -> Streams:
        if self.memory == "reversible":
            return backpropagate(self._units, streams)
        for unit in self._units:
            streams = unit(*streams)
        return streams


def _coupling() -> float:
    return 1.0
