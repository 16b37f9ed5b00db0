"""The gradients of a stage's window: micro-batches summed until there are enough for an update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from petra_zoo.petra.waiting import wait_for


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


class Averaging:
    """The average of tensors of one type over the replicas of a stage, in one message that is under way.

    Args:
        tensors: become the averages when it has ended, and stay as they are until then.
        group: the stage's process in each replica.
    """

    @torch.no_grad()
    def __init__(self, tensors: Sequence[Tensor], group: ProcessGroup) -> None:
        self.tensors, self.group = tensors, group
        self.flat = torch.cat([x.flatten() for x in tensors])
        self._work = dist.all_reduce(self.flat, group=group, async_op=True)

    @torch.no_grad()
    def finish(self, timeout: timedelta, what: str = "gradients") -> None:
        """Waits until it has ended.

        Raises:
            LinkError: a replica has gone, or is silent for longer than the timeout (where NCCL does not watch over it).
        """
        limit = None if self.flat.is_cuda else timeout
        wait_for(self._work, limit, f"rank {dist.get_rank()} waits for the {what} of other replicas")
        self.flat /= dist.get_world_size(self.group)
        for x, mean in zip(self.tensors, self.flat.split([x.numel() for x in self.tensors]), strict=True):
            x.copy_(mean.view_as(x))
