"""A stand-in for a CUDA graph on the CPU: what is captured is a list of operations on fixed memory.

As on a GPU, a replay runs no Python: numbers are what they were at the capture, every operation reads and writes the
addresses it did then, and what is captured has not been done before the first replay.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from petra_zoo.petra.generator import seeded_by, set_generators
from petra_zoo.petra.host_reads import host_read, tensors_in
from petra_zoo.petra.tick import InLine, Lanes

CPU = torch.device("cpu")


class HostReadError(RuntimeError):
    """The host wants to know a value, which a graph cannot tell."""


class FakeGraph:
    """See above."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], None]] = []
        self.seeds: Sequence[int | None] = ()

    def capture(self, work: Callable[[Lanes], None], seeds: Sequence[int | None], widest: int = 0) -> None:
        numbers = iter(range(len(seeds)))

        def seed(_seed: int, unit: int, _micro_batch: int) -> None:
            if unit >= 0:
                n = next(numbers)
                self.steps.append(lambda: self.seed(self.seeds[n]))

        recording = Recording(self.steps)
        try:
            with seeded_by(seed), torch.random.fork_rng([]), recording:
                work(InLine())
        finally:
            recording.undo()

    def seed(self, number: int | None) -> None:
        if number is not None:
            set_generators(number, CPU)

    def replay(self, seeds: Sequence[int | None]) -> None:
        self.seeds = seeds
        with torch.no_grad(), torch.random.fork_rng([]):
            for step in self.steps:
                step()


class Recording(TorchDispatchMode):
    """Inside, operations are noted, and done so that there are results; one that tells the host a value is refused."""

    def __init__(self, steps: list[Callable[[], None]]) -> None:
        super().__init__()
        self.steps = steps
        self.made: set[int] = set()  # addresses of what is no constant
        self.found: dict[int, tuple[Tensor, Tensor]] = {}  # what was there before, by address, and its contents

    def undo(self) -> None:
        """Whatever was there before gets its contents back."""
        for there, contents in self.found.values():
            there.copy_(contents)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = [*args, *kwargs.values()]
        for x in tensors_in(operands):
            whole = x.untyped_storage()
            if whole.data_ptr() not in self.made and whole.data_ptr() not in self.found:
                there = torch.empty(0, dtype=torch.uint8).set_(whole)
                self.found[whole.data_ptr()] = (there, there.clone())
        result = func(*args, **kwargs)
        given = {x.untyped_storage().data_ptr() for x in tensors_in(operands)}
        if (what := host_read(func, operands, result)) and given & self.made:
            raise HostReadError(what)
        self.made |= {x.untyped_storage().data_ptr() for x in tensors_in([result])} - given
        # Without their version counters: a replay on a GPU does not count as a modification either.
        made = [x.data for x in tensors_in([result]) if x.untyped_storage().data_ptr() not in given]
        is_view = not made and not func._schema.is_mutable
        if not (is_view or func.name().startswith(("aten::empty", "aten::new_empty"))):
            self.steps.append(Step(func, tree_map(_data, args), tree_map(_data, kwargs), made, given))
        return result


class Step:
    """One operation and where its results lie."""

    def __init__(self, func: Any, args: Any, kwargs: Any, made: list[Tensor], given: set[int]) -> None:
        self.func, self.args, self.kwargs, self.made, self.given = func, args, kwargs, made, given

    def __call__(self) -> None:
        result = self.func(*self.args, **self.kwargs)
        new = [x for x in tensors_in([result]) if x.untyped_storage().data_ptr() not in self.given]
        for there, x in zip(self.made, new, strict=True):
            there.copy_(x)


def _data(x: Any) -> Any:
    return x.data if isinstance(x, Tensor) else x
