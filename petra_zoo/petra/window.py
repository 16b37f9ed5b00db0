"""The gradients of a stage's window: micro-batches summed until there are enough for an update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from petra_zoo.petra.waiting import reduce_within
from petra_zoo.petra.world import START_TIMEOUT


class Window:
    """Sums gradients in memory that stays where it is from window to window, a few operations for all of them.

    A parameter's `grad` is that memory while its window has a gradient of it, and None before.
    """

    def __init__(self) -> None:
        self._homes: dict[int, Tensor] = {}  # by parameter's id; made like its first gradient

    @torch.no_grad()
    def add(self, parameters: Iterable[nn.Parameter], found: Mapping[int, Tensor]) -> None:
        """Adds a micro-batch's gradients.

        Args:
            parameters: of the stage.
            found: gradients by parameter's id, in any floating type; a parameter may have none.
        """
        # By type of gradient and of sum: a GPU has one kernel for many tensors where all of them are alike.
        alike: dict[tuple[torch.dtype, torch.dtype, bool], tuple[list[Tensor], list[Tensor]]] = {}
        for p in parameters:
            gradient = found.get(id(p))
            if gradient is None:
                continue
            begins = p.grad is None
            if p.grad is None:
                p.grad = self._home(p, gradient)
            sums, gradients = alike.setdefault((gradient.dtype, p.grad.dtype, begins), ([], []))
            sums.append(p.grad)
            gradients.append(gradient)
        for (narrow, wide, begins), (sums, gradients) in alike.items():
            if begins:
                torch._foreach_copy_(sums, gradients)
            elif narrow == wide:
                torch._foreach_add_(sums, gradients)
            else:
                cast = [torch.empty_like(x) for x in sums]
                torch._foreach_copy_(cast, gradients)
                torch._foreach_add_(sums, cast)

    def holds(self, p: nn.Parameter) -> bool:
        """Whether a parameter's sum, if it has one, is where it ever is: nobody has put another tensor there."""
        return p.grad is None or p.grad is self._homes.get(id(p))

    @torch.no_grad()
    def restore(self, p: nn.Parameter, gradient: Tensor | None) -> None:
        """Sets a parameter's sum so far."""
        p.grad = None if gradient is None else self._home(p, gradient).copy_(gradient)

    def _home(self, p: nn.Parameter, gradient: Tensor) -> Tensor:
        home = self._homes.get(id(p))
        if home is None or home.device != gradient.device or home.shape != gradient.shape:
            home = self._homes[id(p)] = torch.empty_like(gradient, dtype=p.dtype)
        return home


@torch.no_grad()
def average(
    tensors: Sequence[Tensor], group: ProcessGroup, timeout: timedelta = START_TIMEOUT, what: str = "gradients"
) -> None:
    """Averages gradients over the replicas of a stage, in one message; or other tensors of one type.

    Raises:
        LinkError: a replica is silent for longer than the timeout.
    """
    if tensors:
        flat = torch.cat([x.flatten() for x in tensors])
        reduce_within(timeout, flat, group, f"rank {dist.get_rank()} waits for the {what} of other replicas")
        flat /= dist.get_world_size(group)
        for x, mean in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
            x.copy_(mean.view_as(x))
