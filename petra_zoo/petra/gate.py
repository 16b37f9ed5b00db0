"""What a stage does with a micro-batch whose numbers are not finite: it lets none of them in.

Each stage decides by its own gradients, and on a GPU nobody reads the decision: it is a number on the device. What goes
down of a micro-batch that was left out is not a number, all of it, and so the stages below leave it out too: in one
process as in several, and through whatever types messages travel in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from petra_zoo.petra.finite import pooled
from petra_zoo.petra.part import StageSettings
from petra_zoo.petra.waiting import reduce_within
from petra_zoo.petra.window import Averaging
from petra_zoo.reversible import Gradients, Unit

Found = dict[int, Tensor]  # gradients by parameter's id


class Gate:
    """Lets every micro-batch in: an update that is not finite is left out, and ends the run.

    Args:
        settings: of the stage.
    """

    def __init__(self, settings: StageSettings) -> None:
        self.finite, self.across = settings.finite, settings.across
        self._ahead = None if settings.static else settings.across  # a captured tick has nothing to wait for later
        self._patience = settings.patience
        self._under_way: Averaging | None = None

    @property
    def dropped(self) -> int:
        """Micro-batches that were left out so far; waits for the device."""
        return 0

    def forward(self) -> AbstractContextManager[None]:
        """Around a forward: what its norms take note of."""
        return nullcontext()

    def saw_loss(self, loss: Tensor, what: str, micro_batch: int) -> None:
        """The loss of a micro-batch, 0-d, in front of its backward."""
        self.finite.see(loss, what, last=micro_batch)

    def let_in(self, found: Found, gradients: Gradients) -> tuple[Found, Gradients]:
        """What of a micro-batch's gradients enters the window, and what goes down."""
        return found, gradients

    def watch(self, norms: Iterable[_BatchNorm]) -> None:
        """Batch norms beside those of the units."""

    def begin_average(self, gradients: list[Tensor], count: int) -> None:
        """Sends the sums of a window to the other replicas, ahead of `average`: other stages work meanwhile.

        Args:
            gradients: the sums, which stay as they are until then.
            count: micro-batches in the window.
        """
        if self._ahead is not None and gradients:
            _divide(gradients, count)
            self._under_way = Averaging(gradients, self._ahead)

    def average(self, gradients: list[Tensor], count: int, what: str, last: int) -> Tensor | None:
        """Turns the sums of a window into what an update goes by.

        Args:
            gradients: the sums.
            count: micro-batches in the window; `last`: the last of them.
            what: the gradients in words.

        Returns:
            A number, 0-d, that is finite where the update may be made; None where the host knows that it may not.
        """
        if self._under_way is None:
            _divide(gradients, count)
        self._average_over_replicas(gradients)
        number = pooled(gradients)
        return number if self.finite.see(number, what, gradients, last, count) else None

    def _average_over_replicas(self, gradients: list[Tensor]) -> None:
        if self.across is not None and gradients:
            (self._under_way or Averaging(gradients, self.across)).finish(self._patience)
            self._under_way = None

    def state_dict(self) -> dict[str, int] | None:
        """What it counts between two ticks."""
        return None

    def load_state_dict(self, state: dict[str, int] | None, in_window: int) -> None:
        """Restores what `state_dict` gave; None where all micro-batches of the window were let in."""


class SkippingGate(Gate):
    """Leaves out micro-batches that are not finite: a window's mean is over the others.

    Args:
        settings: of the stage; say whether the host may read numbers.
        norms: batch norms, whose statistics are as before a forward that has made them infinite or not a number.
    """

    def __init__(self, settings: StageSettings, norms: Iterable[_BatchNorm]) -> None:
        super().__init__(settings)
        self.norms = list(norms)
        self._loss: Tensor | None = None
        self._kept, self._dropped = 0, 0  # in the window; so far
        self._queued: tuple[Tensor, Tensor] | None = None  # the same where nobody waits for numbers, 0-d each

    @property
    def dropped(self) -> int:
        return self._dropped + (int(self._queued[1]) if self._queued else 0)

    @contextmanager
    def forward(self) -> Iterator[None]:
        # Without their version counters: a graph that reads them may be kept until the backward.
        moving = [m for m in self.norms if m.training and m.track_running_stats]
        statistics = [x.data for m in moving for x in (m.running_mean, m.running_var) if x is not None]
        counters = [m.num_batches_tracked.data for m in moving if m.num_batches_tracked is not None]
        if not statistics:
            yield
            return
        before = [_joined(statistics), _joined(counters)]
        yield
        after = [_joined(statistics), _joined(counters)]
        finite = after[0].isfinite().all()
        for buffers, was, now in zip((statistics, counters), before, after, strict=True):
            _part(torch.where(finite, now, was), buffers)

    def saw_loss(self, loss: Tensor, what: str, micro_batch: int) -> None:
        self._loss = loss.detach()

    def let_in(self, found: Found, gradients: Gradients) -> tuple[Found, Gradients]:
        numbers = [*found.values(), *(d for d in gradients if d is not None)]
        numbers += [] if self._loss is None else [self._loss]
        self._loss = None
        finite = pooled(numbers).isfinite()
        if not self.finite.waits(finite.device):
            if finite:
                self._kept += 1
                return found, gradients
            self._dropped += 1
            return {}, tuple(None if d is None else torch.full_like(d, torch.nan) for d in gradients)
        kept, dropped = self._counters(finite.device)
        kept += finite
        dropped += ~finite
        found = {key: torch.where(finite, d, 0.0) for key, d in found.items()}
        return found, tuple(None if d is None else torch.where(finite, d, torch.nan) for d in gradients)

    def watch(self, norms: Iterable[_BatchNorm]) -> None:
        self.norms += norms

    def begin_average(self, gradients: list[Tensor], count: int) -> None:
        """Nothing: what is divided by, and whether at all, the replicas settle when the window is closed."""

    def average(self, gradients: list[Tensor], count: int, what: str, last: int) -> Tensor | None:
        kept = self._close(count)
        if isinstance(kept, Tensor):
            torch._foreach_div_(gradients, kept)  # by 0 where there are none: that is no number, and held back
        elif kept == 0:
            return None
        else:
            _divide(gradients, kept)
        self._average_over_replicas(gradients)
        number = pooled(gradients)
        if isinstance(kept, Tensor) or number.isfinite():
            return number
        self._dropped += kept  # each of them was, but not their sum
        return None

    def _close(self, count: int) -> int | Tensor:
        """How many micro-batches of a window of `count` are in it; with replicas all or none, as all of them agree."""
        if self._queued is None:
            kept, self._kept = self._kept, 0
            return kept if self._everywhere(torch.tensor(kept == count)) else 0
        queued = self._queued[0].clone()
        self._queued[0].zero_()
        return queued * self._everywhere(queued == count)

    def _everywhere(self, here: Tensor) -> Tensor | int:
        """Whether something, 0-d, is so in all replicas; 1 where there is one."""
        if self.across is None:
            return 1
        found = here.to(torch.int32)
        reduce_within(self._patience, found, self.across, "this rank waits for other replicas", dist.ReduceOp.MIN)
        return found

    def state_dict(self) -> dict[str, int]:
        return {"kept": self._kept + (int(self._queued[0]) if self._queued else 0), "dropped": self.dropped}

    def load_state_dict(self, state: dict[str, int] | None, in_window: int) -> None:
        kept, dropped = (state["kept"], state["dropped"]) if state else (in_window, 0)
        if self._queued is None:
            self._kept, self._dropped = kept, dropped
        else:  # where they lie
            self._queued[0].fill_(kept)
            self._queued[1].fill_(dropped)

    def _counters(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._queued is None:
            counts = torch.tensor([self._kept, self._dropped], dtype=torch.float32)
            kept, dropped = counts.to(device).unbind()
            self._queued, self._kept, self._dropped = (kept, dropped), 0, 0
        return self._queued


def gate_for(units: Sequence[Unit], settings: StageSettings) -> Gate:
    """The gate of a stage of these units."""
    if settings.finite.skips:
        return SkippingGate(settings, (m for unit in units for m in unit.state.norms))
    return Gate(settings)


@contextmanager
def holding_back(optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor], number: Tensor) -> Iterator[None]:
    """Inside, an optimizer's step changes nothing where a number, 0-d, is not finite; nobody waits for it.

    One that is not of torch's fused ones makes a step of zero gradients instead.
    """
    wrong = ~number.isfinite()
    fused = type(optimizer).__module__.startswith("torch.optim") and all(g.get("fused") for g in optimizer.param_groups)
    if not (fused and optimizer.state):  # in a first step what it leaves out would stay what memory happened to hold
        for d in gradients:
            d.masked_fill_(wrong, 0.0)
        yield
        return
    vars(optimizer)["found_inf"] = wrong.float()  # where a gradient scaler tells it
    try:
        yield
    finally:
        del vars(optimizer)["found_inf"]


def _divide(sums: list[Tensor], count: int) -> None:
    if count > 1 and sums:
        torch._foreach_div_(sums, float(count))


def _joined(buffers: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in buffers]) if buffers else torch.empty(0)


def _part(joined: Tensor, buffers: Sequence[Tensor]) -> None:
    parts = joined.split([x.numel() for x in buffers]) if buffers else ()
    torch._foreach_copy_(list(buffers), [x.view_as(y) for x, y in zip(parts, buffers, strict=True)])
