"""What a run of streams on a grid has seen of its range: noted on the device, read when somebody asks."""

from __future__ import annotations

import torch
from torch import Tensor

from petra_zoo.errors import UserError


class Saturation:
    """The largest values that streams on a grid were to take, in parts of its range.

    On the CPU a value beyond the range raises at once. A GPU's is noted in a tensor there, without waiting for it:
    `check` reads it, `beyond` hands it on. Copies and pickles begin with nothing seen.

    Attributes:
        deferred: as on a GPU, wherever values are.
    """

    def __init__(self) -> None:
        self.deferred = False
        self._seen: dict[torch.device, Tensor] = {}
        self._range = 0.0

    def __reduce__(self) -> tuple[type[Saturation], tuple[()]]:
        return type(self), ()

    def note(self, peak: Tensor, grid: float, most: float) -> None:
        """Takes note of values before they are clamped.

        Args:
            peak: the largest absolute value, 0-d, in steps of the grid.
            grid: the step.
            most: how many there may be.

        Raises:
            UserError: it is beyond the range, or not a number, and on the CPU.
        """
        if peak.is_meta:
            return
        part = peak.detach().float() / most
        self._range = grid * most
        if part.is_cpu and not self.deferred:
            self._judge(part.item())
            return
        seen = self._seen.get(part.device)
        if seen is None:
            self._seen[part.device] = part
        else:
            torch.maximum(seen, part, out=seen)

    def check(self) -> None:
        """Reads what was noted, and forgets it: waits for the device.

        Raises:
            UserError: a value was beyond the range, or not a number.
        """
        for seen in self._seen.values():
            part = seen.item()
            seen.zero_()  # the tensor stays: a captured graph goes on writing there
            self._judge(part)

    def beyond(self) -> list[Tensor]:
        """Numbers, 0-d on their devices, that are finite where all values were in range; waits for nothing."""
        return [torch.where(part <= 1.0, part, torch.inf) for part in self._seen.values()]

    def _judge(self, part: float) -> None:
        if not part <= 1.0:
            raise UserError(
                f"exact inversion needs |stream| < {self._range:g}, found {part * self._range:g}: use a coarser grid "
                "(exact=True: a smaller exact_bits; streams='fixed16': choose_grids), or float32 streams without exact"
            )
