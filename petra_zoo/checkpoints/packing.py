"""A state as one safetensors file, and back: no pickle, nothing that a stranger's file could run.

What torch calls a state dict is nested: dictionaries, lists and tuples of tensors and plain values. Tensors go into the
file as they are; the nesting goes as JSON into its header, where every JSON object is marked with what it stands for:

    {"dict": [[KEY, VALUE], ...]}    {"tuple": [VALUE, ...]}    {"float": "nan"}
    {"tensor": NAME}                 {"tensor": NAME, "stride": [...]} where it does not lie in the order of its shape

Strides are part of the state: kernels choose by them, and so they decide bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from petra_zoo.errors import Failure
from petra_zoo.petra.optimization import State
from petra_zoo.strict_json import Json, to_json

TREE = "petra_zoo.state"  # the name of the nesting in the header
_DEEPEST = 64  # levels of nesting: a stranger's file must not exhaust the stack
_LARGEST_HEADER = 32 << 20  # bytes; thousands of tensors take less than one mebibyte

Value: TypeAlias = (
    "Tensor | bool | int | float | str | Sequence[Value] | Mapping[str, Value] | Mapping[str | int, Value] | None"
)


class CheckpointError(Failure):
    """A checkpoint that cannot be used: says which file, and what is wrong with it."""


def to_safetensors(state: State) -> bytes:
    """A state as the content of a safetensors file: the same state gives the same bytes.

    Copies every tensor, so that training may go on.

    Raises:
        TypeError: it holds something else than tensors and plain values; says where.
    """
    tensors: dict[str, Tensor] = {}
    tree = to_json(_take_apart(state, (), tensors))
    return save(tensors, {TREE: tree})


def from_safetensors(path: Path) -> State:
    """The state in a file; its tensors are nobody else's, on the CPU.

    Raises:
        CheckpointError: it is no such file.
    """
    try:
        _check_header(path)
        with safe_open(path, framework="pt") as file:
            tree = json.loads((file.metadata() or {})[TREE])
            state = _Tensors(file, set(file.keys())).put_together(tree)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError, RuntimeError) as error:
        raise CheckpointError(f"{path} holds no state: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds no state: expected a dictionary, not {type(state).__name__}")
    return state


def _take_apart(value: Value, place: tuple[str, ...], tensors: dict[str, Tensor]) -> Json:
    """The JSON that stands for a value; its tensors are added by name."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else {"float": repr(value)}
    if isinstance(value, Tensor):
        return _take_tensor(value, place, tensors)
    if isinstance(value, dict):
        return {"dict": [[_key(key, place), _take_apart(x, (*place, str(key)), tensors)] for key, x in value.items()]}
    if isinstance(value, list | tuple):
        items = [_take_apart(x, (*place, str(i)), tensors) for i, x in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise TypeError(f"{'.'.join(place)} is a {type(value).__name__}: a state holds tensors and plain values")


def _key(key: Value, place: tuple[str, ...]) -> str | int:
    if isinstance(key, str | int) and not isinstance(key, bool):
        return key
    raise TypeError(f"a key of {'.'.join(place)} is a {type(key).__name__}: expected text or a whole number")


def _take_tensor(x: Tensor, place: tuple[str, ...], tensors: dict[str, Tensor]) -> Json:
    name = ".".join(place)
    while name in tensors:  # a key may have a dot in it
        name += "'"
    x = x.detach()
    dense = torch.empty_like(x, device="cpu")  # dense, in x's order, whatever x is a part of
    dense.copy_(x)
    order = _from_outermost(dense.stride())
    tensors[name] = dense.permute(order).contiguous()
    if dense.is_contiguous() and dense.stride() == _plain_stride(dense.shape):
        return {"tensor": name}
    return {"tensor": name, "stride": list(dense.stride())}


def _check_header(path: Path) -> None:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > _LARGEST_HEADER:
        raise ValueError(f"its header claims {size:,} bytes")


class _File(Protocol):
    """What is read of a safetensors file."""

    def get_tensor(self, name: str, /) -> Tensor: ...


class _Tensors:
    """Puts a state together again.

    Args:
        file: where its tensors are.
        names: of them; each may be used once, or a small file could ask for any amount of memory.
    """

    def __init__(self, file: _File, names: set[str]) -> None:
        self.file, self.names = file, names

    def put_together(self, tree: Json, depth: int = 0) -> Value:
        if depth > _DEEPEST:
            raise ValueError(f"more than {_DEEPEST} levels of nesting")
        if isinstance(tree, list):
            return [self.put_together(x, depth + 1) for x in tree]
        if not isinstance(tree, dict):
            return tree
        match tree:
            case {"dict": list(pairs), **others} if not others:
                return {_key(key, ()): self.put_together(x, depth + 1) for key, x in pairs}
            case {"tuple": list(items), **others} if not others:
                return tuple(self.put_together(x, depth + 1) for x in items)
            case {"float": str(word), **others} if not others:
                return float(word)
            case {"tensor": str(name), **others} if not others:
                return self._take(name).clone()
            case {"tensor": str(name), "stride": list(stride), **others} if not others:
                return _laid_out(self._take(name), stride)
        raise ValueError(f"its tree has a part that nobody knows: {str(tree)[:60]}")

    def _take(self, name: str) -> Tensor:
        self.names.remove(name)
        return self.file.get_tensor(name)


def _laid_out(dense: Tensor, stride: Sequence[Json]) -> Tensor:
    """A tensor in the order of its strides; `dense` has its dimensions from the outermost to the innermost."""
    steps = [step for step in stride if isinstance(step, int) and step >= 0]
    if len(steps) != dense.ndim or len(steps) != len(stride):
        raise ValueError(f"strides {stride} of a tensor with {dense.ndim} dimensions")
    order = _from_outermost(steps)
    back = [order.index(i) for i in range(dense.ndim)]
    shape = [dense.shape[i] for i in back]
    # Strides that leave holes would ask for memory that the file does not have.
    if dense.numel() and 1 + sum((n - 1) * step for n, step in zip(shape, steps, strict=True)) != dense.numel():
        raise ValueError(f"strides {stride} do not fit a tensor of shape {shape}")
    return torch.empty_strided(shape, steps, dtype=dense.dtype).copy_(dense.permute(back))


def _from_outermost(stride: Sequence[int]) -> list[int]:
    return sorted(range(len(stride)), key=lambda i: (-stride[i], i))


def _plain_stride(shape: torch.Size) -> tuple[int, ...]:
    steps, step = [], 1
    for n in reversed(shape):
        steps.append(step)
        step *= max(1, n)
    return tuple(reversed(steps))
