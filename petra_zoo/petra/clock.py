"""The pipeline's clock: which stage works in which tick."""

from __future__ import annotations


class Clock:
    """Counts ticks and remembers in which of them a micro-batch was fed.

    Micro-batch fed at tick n: forward at stage i in tick n + i, backward in tick n + 2 (J - 1) - i (section 3 of
    arXiv 2406.02052). Without delay (the exact methods) both happen in tick n.

    Args:
        stages: J.
        delayed: whether messages take a tick.
        backwards: whether gradients travel down.
        lowest: the stage that they travel down to; below it nothing trains.
    """

    def __init__(self, stages: int, delayed: bool, backwards: bool = True, lowest: int = 0) -> None:
        self.stages, self.delayed, self.backwards, self.lowest = stages, delayed, backwards, lowest
        self.tick = -1
        self.fed: dict[int, bool] = {}  # of the ticks that still matter

    def next_tick(self, fed: bool) -> None:
        """Begins a tick."""
        self.tick += 1
        self.fed[self.tick] = fed
        self.fed.pop(self.tick - 2 * self.stages, None)

    def forward(self, stage: int, tick: int | None = None) -> bool:
        """Whether a stage runs a forward in a tick (default: the present one)."""
        return self._was_fed(tick, stage if self.delayed else 0)

    def backward(self, stage: int, tick: int | None = None) -> bool:
        """Whether a stage runs a backward in a tick (default: the present one)."""
        return self._comes_back(stage) and self._was_fed(tick, self._returns_after(stage))

    def backwards_within(self, stage: int, ticks: int) -> int:
        """How many backwards a stage runs in the present tick and those behind it, of `ticks` ticks together.

        At most 2 (J - 1 - j) of them: what comes back within these has been fed by now.
        """
        first = self.tick - self._returns_after(stage)
        return sum(self.fed.get(first + i, False) for i in range(ticks)) if self._comes_back(stage) else 0

    @property
    def steady(self) -> bool:
        """Whether every stage does in the present tick all that it ever does in one."""
        longest = (2 if self.backwards else 1) * (self.stages - 1) if self.delayed else 0
        return all(self._was_fed(None, ago) for ago in range(longest + 1))

    @property
    def in_flight(self) -> int:
        """Micro-batches fed whose last message has not been received."""
        if not self.delayed:
            return 0
        longest = 2 * (self.stages - 1) - self.lowest if self.backwards else self.stages - 1
        return sum(fed for tick, fed in self.fed.items() if tick + longest > self.tick)

    def _was_fed(self, tick: int | None, ago: int) -> bool:
        return self.fed.get((self.tick if tick is None else tick) - ago, False)

    def _comes_back(self, stage: int) -> bool:
        return self.backwards and stage >= self.lowest

    def _returns_after(self, stage: int) -> int:
        """Ticks from feeding a micro-batch to its backward in a stage."""
        return 2 * (self.stages - 1) - stage if self.delayed else 0
