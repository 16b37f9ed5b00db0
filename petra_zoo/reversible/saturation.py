"""What a run of streams on a grid has seen, and must not have: noted on the device, read when somebody asks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Variable

from petra_zoo.errors import Failure, UserError


class NotRecomputedError(Failure):
    """A branch that is to be recomputed to the bit was not; names its unit."""


class Saturation:
    """The largest values that streams on a grid were to take, in parts of its range; and recomputations that differ.

    On the CPU what must not be raises at once. A GPU's is noted in tensors there, without waiting for it: `check` reads
    them, `beyond` and `differing` hand them on. Recomputations are read at the end of the backward pass as well, once
    for all of them: it is the last moment at which nothing has been updated by such gradients, and unlike the next
    forward it always comes. Copies and pickles begin with nothing seen.

    Attributes:
        deferred: as on a GPU, wherever values are, and for an engine that reads by itself: nothing is read at the end
            of a backward pass.
    """

    def __init__(self) -> None:
        self.deferred = False
        self._seen: dict[torch.device, Tensor] = {}
        self._range = 0.0
        self._differs: dict[str, Tensor] = {}  # by unit, in the order in which they go backward: 0, or infinity
        self._backward = -1  # the backward pass at whose end it is read

    def __reduce__(self) -> tuple[type[Saturation], tuple[()]]:
        return type(self), ()

    def note(self, peak: Tensor, grid: float, most: float) -> bool:
        """Takes note of values before they are clamped.

        Args:
            peak: the largest absolute value, 0-d, in steps of the grid.
            grid: the step.
            most: how many there may be.

        Returns:
            Whether it is known that there is nothing to clamp.

        Raises:
            UserError: it is beyond the range, or not a number, and on the CPU.
        """
        if peak.is_meta:
            return False
        part = peak.detach().float() / most
        self._range = grid * most
        if self._reads_at_once(part):
            self._judge(part.item())
            return True
        seen = self._seen.get(part.device)
        if seen is None:
            self._seen[part.device] = part
        else:
            torch.maximum(seen, part, out=seen)
        return False

    def compare(self, unit: str, then: Tensor, now: Tensor) -> None:
        """Takes note of the checksums, 0-d, of a unit's branch in its forward and in its recomputation.

        Raises:
            NotRecomputedError: they differ, on the CPU.
        """
        if then.is_meta:
            return
        if self._reads_at_once(then):
            if then.item() != now.item():
                raise _not_recomputed(unit)
            return
        differs = torch.where(then == now, 0.0, torch.inf)
        seen = self._differs.get(unit)
        if seen is None:
            self._differs[unit] = differs
        else:
            torch.maximum(seen, differs, out=seen)
        self._read_at_the_end()

    def check(self) -> None:
        """Reads what was noted, and forgets it: waits for the device.

        Raises:
            UserError: a value was beyond the range, or not a number.
            NotRecomputedError: a branch was not recomputed to the bit; the first on the way back is named.
        """
        for seen in self._seen.values():
            part = seen.item()
            seen.zero_()  # the tensor stays: a captured graph goes on writing there
            self._judge(part)
        self._check_recomputations()

    def beyond(self) -> list[Tensor]:
        """Numbers, 0-d on their devices, that are finite where all values were in range; waits for nothing."""
        return [torch.where(part <= 1.0, part, torch.inf) for part in self._seen.values()]

    def differing(self) -> dict[str, Tensor]:
        """Of each unit a number, 0-d, that is finite where its branch was recomputed to the bit; waits for nothing."""
        return self._differs

    def _reads_at_once(self, x: Tensor) -> bool:
        return x.is_cpu and not self.deferred

    def _judge(self, part: float) -> None:
        if not part <= 1.0:
            raise UserError(
                f"exact inversion needs |stream| < {self._range:g}, found {part * self._range:g}: use a coarser grid "
                "(exact=True: a smaller exact_bits; streams='fixed16': choose_grids), or float32 streams without exact"
            )

    def _read_at_the_end(self) -> None:
        """Of the backward pass under way, once; outside of any, somebody else reads."""
        backward = torch._C._current_graph_task_id()
        if backward >= 0 and backward != self._backward and not self.deferred:
            self._backward = backward
            Variable._execution_engine.queue_callback(self.check)  # the range too: beyond it nothing comes back

    def _check_recomputations(self) -> None:
        if not self._differs:
            return
        numbers = torch.stack(list(self._differs.values())).tolist()
        units = [unit for unit, number in zip(self._differs, numbers, strict=True) if number > 0.0]
        if units:
            for seen in self._differs.values():
                seen.zero_()
            raise _not_recomputed(units[0])


def _not_recomputed(unit: str) -> NotRecomputedError:
    return NotRecomputedError(
        f"the branch of {unit} did not give in the backward, bit for bit, what it gave in the forward, on which exact "
        "inversion rests: a kernel that is not deterministic, a weight changed in between through .data, or a state of "
        "the branch's own; see torch.use_deterministic_algorithms, or use exact=False"
    )
