"""What a study is: contenders, repeats, and what one run measures."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

from petra_zoo.bench.results import Results, Trial
from petra_zoo.strict_json import JsonObject

__all__ = ["Results", "Study", "Trial", "interleaved"]


class Study(ABC):
    """Contenders that are compared by the same measurements, run after run.

    It travels to worker processes, so it must be picklable; a worker asks the same object for one run after the other,
    so what is dear to make may be kept in it.

    Attributes:
        kind: which command makes it, and whose tables show it.
        shares_the_machine: whether runs may go on side by side; not where time is what they measure.
    """

    kind: ClassVar[str]
    shares_the_machine: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Tells it from other studies of its kind."""
        return self.kind

    def about(self) -> JsonObject:
        """What tables must know beside the runs; it is kept with them."""
        return {}

    @abstractmethod
    def trials(self, results: Results) -> Sequence[Trial]:
        """The runs, in the order in which they are to happen: contenders take turns (`interleaved`).

        Asked again after every run: what has come out so far may decide what comes next.

        Args:
            results: what there is.
        """

    def expected(self, results: Results) -> int:
        """How many runs there will be in the end."""
        return len(self.trials(results))

    @abstractmethod
    def run(self, trial: Trial) -> JsonObject:
        """Does one run, in a worker process with one thread.

        Returns:
            Measured values by name.

        Raises:
            Failure: the contender broke down (training has diverged): a result like any other, kept with its reason.
            UserError: the study cannot go on.
        """

    @abstractmethod
    def command(self, trial: Trial) -> str:
        """What a user types to repeat a run."""

    def title(self, trial: Trial) -> str:
        """A run in a few words, for progress and errors."""
        return str(trial)

    def close(self) -> None:  # noqa: B027 (most have nothing to end)
        """A worker ends, by Ctrl-C too: ends what its runs have left behind."""


def interleaved(contenders: Sequence[str], repeats: Sequence[int], *, shuffled: bool) -> Iterator[tuple[str, int]]:
    """Every contender once, then every contender again: what changes on the machine meets all of them.

    Args:
        contenders: their names.
        repeats: seeds or rounds.
        shuffled: in an order of its own in each repeat, the same ones every time: where time is measured, so that
            none profits from the one before it.

    Yields:
        (contender, repeat)
    """
    for repeat in repeats:
        order = list(contenders)
        if shuffled:
            random.Random(repeat).shuffle(order)
        yield from ((contender, repeat) for contender in order)
