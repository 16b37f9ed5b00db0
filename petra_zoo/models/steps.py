"""What a container of blocks does one after the other: its blocks, or their branches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from petra_zoo.models.branches import Branch, held_by
from petra_zoo.models.shared_arguments import Given
from petra_zoo.reversible import run_branch


@dataclass(frozen=True)
class Step:
    """A block, or one of its branches, in its place.

    Attributes:
        name: the block's in the container, with the branch's behind it.
        key: the block's.
        block: the block.
        function: B or F: (h, what all blocks take beside it) -> [B, ...].
        whole: it is B.
        index: the block's place.
        in_front: how many blocks of its run are in front of the block; -1: it is in none.
        part, parts: which of the block's branches it is, of how many.
    """

    name: str
    key: str
    block: nn.Module
    function: Branch
    whole: bool
    index: int
    in_front: int
    part: int
    parts: int

    def __call__(self, h: Tensor, *shared: Given, **named: Given) -> Tensor:
        """B(h) or F(h), compiled where that is asked for."""
        return run_branch(self.block, self.name.removeprefix(self.key), self.function, h, *shared, **named)

    @property
    def holder(self) -> nn.Module:
        """What holds its parameters, and no other step's."""
        return self.block if self.whole else held_by(self.block, self.name.removeprefix(f"{self.key}."))

    @property
    def in_run(self) -> bool:
        """Whether it has an inverse where g > 0."""
        return self.in_front >= 0

    @property
    def starts(self) -> bool:
        """Whether it is the first of its run."""
        return self.in_front == 0 and self.part == 0

    @property
    def ends(self) -> bool:
        """Whether it is the last of its block."""
        return self.part == self.parts - 1

    def is_anchor(self, every: int) -> bool:
        """Whether the streams in front of it are kept, as they are every so many blocks; 0: never."""
        return every > 0 and self.in_front > 0 and self.part == 0 and self.in_front % every == 0
