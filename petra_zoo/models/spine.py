"""Which modules a network is made of, one behind the other: what its units can be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from petra_zoo.models.shared_arguments import Given, Named


@dataclass
class _Call:
    """A call of a module, with the calls that happened in it.

    Attributes:
        path: the module's name.
        given: the tensor that it took, if that was all, and how often it had been written to.
        result: the tensor that it gave, likewise.
        inner: the calls.
    """

    path: str
    given: tuple[Tensor, int] | None = None
    result: tuple[Tensor, int] | None = None
    inner: list[_Call] = field(default_factory=list)


def spine_of(model: nn.Module, inputs: Sequence[Tensor], whole: Iterable[str]) -> list[str]:
    """Names of modules that, called one after the other, are the network as it was seen in one call.

    Args:
        model: that takes the inputs.
        inputs: in front of the first module.
        whole: names of modules that have to be in the list, undivided; without them nothing is divided. "" in the list
            is the network itself.
    """
    root = _Call("")
    with _hooks(model, root):
        model(*inputs)
    return _divided(root.inner[0], tuple(whole))


def _divided(call: _Call, whole: Sequence[str]) -> list[str]:
    prefix = f"{call.path}." if call.path else ""
    if call.path in whole or not any(path.startswith(prefix) for path in whole):
        return [call.path]
    parts: list[str] = []
    x = call.given
    for inner in call.inner:
        if x is None or not _same(x, inner.given):
            return [call.path]  # it does something between its modules
        x = inner.result
        parts += _divided(inner, whole)
    return parts if x is not None and _same(x, call.result) and len(set(parts)) == len(parts) else [call.path]


def _same(x: tuple[Tensor, int], y: tuple[Tensor, int] | None) -> bool:
    return y is not None and x[0] is y[0] and x[1] == y[1]


@contextmanager
def _hooks(model: nn.Module, root: _Call) -> Iterator[None]:
    stack = [root]
    handles: list[RemovableHandle] = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(_begin, stack, path), with_kwargs=True))
        handles.append(module.register_forward_hook(partial(_end, stack)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _begin(stack: list[_Call], path: str, module: nn.Module, args: tuple[Given, ...], kwargs: Named) -> None:
    call = _Call(path, _noted(args[0]) if len(args) == 1 and not kwargs else None)
    stack[-1].inner.append(call)
    stack.append(call)


def _end(stack: list[_Call], module: nn.Module, args: tuple[Given, ...], output: Given) -> None:
    stack.pop().result = _noted(output)


def _noted(x: Given) -> tuple[Tensor, int] | None:
    return (x, x._version) if isinstance(x, Tensor) else None
