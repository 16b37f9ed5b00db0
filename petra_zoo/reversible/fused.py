"""Pointwise functions of large tensors, each a single kernel on a GPU where torch.compile can make one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.overrides import _pop_mode_temporarily

Results = tuple[Tensor, ...]
Counter = Callable[[tuple[Tensor, ...], Callable[[], Results]], Results]
_counters: list[Counter] = []


class Fused:
    """A function that treats every element of its tensors alike: compiled on CUDA devices, elsewhere as it is written.

    The bits are the same: it is exact in float32 but for roundings that both do alike. Where there is no compiler, or
    it fails, the function goes on as it is written, and a debug line of the log says so.

    Args:
        function: from tensors of one shape and layout, and numbers or types, to tensors of that shape; a 0-d one is a
            maximum over the elements.
    """

    def __init__(self, function: Callable[..., Results]) -> None:
        self.written = function
        self.compiles = True
        self._compiled: Callable[..., Results] | None = None

    def is_one_kernel(self, *tensors: Tensor) -> bool:
        """Whether it is compiled for them."""
        return bool(_counters) or (self.compiles and tensors[0].is_cuda and _lie_alike(tensors))

    def __call__(self, *tensors: Tensor, **settings: float | torch.dtype) -> Results:
        if _counters:
            return _counters[-1](tensors, lambda: self.written(*tensors, **settings))
        if self.is_one_kernel(*tensors):
            try:
                return self.compiled(*tensors, **settings)
            except Exception as error:  # whatever a compiler raises: no C compiler, no Triton, an operation it lacks
                self.compiles = False
                logging.getLogger("petra_zoo").debug("%s runs as written: %s", self.written.__name__, error)
        return self.written(*tensors, **settings)

    def compiled(self, *tensors: Tensor, **settings: float | torch.dtype) -> Results:
        """The compiled function of tensors that lie alike and without gaps."""
        if self._compiled is None:  # not at import; one for all sizes: it sees the elements in a row
            self._compiled = torch.compile(self.written, dynamic=True, fullgraph=True)
        shape, stride = tensors[0].shape, tensors[0].stride()
        with _alone():
            found = self._compiled(*(x.as_strided((x.numel(),), (1,)) for x in tensors), **settings)
        return tuple(x.as_strided(shape, stride) if x.ndim else x for x in found)


@contextmanager
def counted_by(counter: Counter) -> Iterator[None]:
    """Inside, calls go to a counter: it takes their tensors and what gives their results, and counts one kernel."""
    _counters.append(counter)
    try:
        yield
    finally:
        _counters.pop()


@contextmanager
def _alone() -> Iterator[None]:
    """Inside, no mode of functions and no autocast: each would make a variant of its own, and there is a limit."""
    with ExitStack() as stack:
        for _ in range(torch._C._len_torch_function_stack()):
            stack.enter_context(_pop_mode_temporarily())
        stack.enter_context(torch.autocast("cuda", enabled=False))
        stack.enter_context(torch.autocast("cpu", enabled=False))
        yield


def _lie_alike(tensors: tuple[Tensor, ...]) -> bool:
    """Whether memory has the elements of all of them in the same order, without gaps."""
    first = tensors[0]
    dense = first.is_contiguous() or (first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last))
    return dense and all(x.shape == first.shape and x.stride() == first.stride() for x in tensors[1:])
