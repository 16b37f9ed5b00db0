"""Networks larger than this process's memory: built without their large tensors, which are filled where it wants them.

What is done to a large tensor while a network is built (drawn, scaled, read from a file, copied) is noted and done
later, for the tensors that somebody asks for, with the random numbers that it would have drawn: to the bit what
building the network at once gives. The idea is that of torchdistx's deferred initialisation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from os import PathLike

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

LARGE = 2**16  # elements: smaller tensors are built at once, and networks compute with them while they are built
# By the names of safetensors: what numpy knows, too. Others torch reads, and maps the whole file to do so.
_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}


class Deferred(TorchDispatchMode):
    """Inside, large tensors are made on the meta device, and what is done to them is noted; `fill` does it.

    Weights in safetensors files are read when they are filled: the file must stay until then. What needs values at once
    (a comparison, a small tensor computed of a large one) gets them.

    Args:
        least: elements from which on a tensor is large.

    Example:
        >>> with Deferred.building() as deferred:
        ...     model = timm.create_model("petra_vit_large_patch16_224")
        >>> deferred.fill(model.blocks[:4])
    """

    def __init__(self, least: int = LARGE) -> None:
        super().__init__()
        self.least = least
        self._steps: dict[int, list[_Step]] = {}  # by storage
        self._numbers = count()
        self._scratch = torch.empty(0, dtype=torch.uint8)

    @classmethod
    @contextmanager
    def building(cls, least: int = LARGE) -> Iterator[Deferred]:
        """Everything within is built that way."""
        deferred, load_file = cls(least), safetensors.torch.load_file
        safetensors.torch.load_file = deferred._load_file  # it has no lazy one, and timm calls it by this name
        try:
            with deferred:
                yield deferred
        finally:
            safetensors.torch.load_file = load_file
        deferred._scratch = torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def fill(self, module: nn.Module, leave: Collection[nn.Module] = ()) -> None:
        """Gives large tensors their values, on the CPU and in place: whoever holds such a tensor has it filled.

        Args:
            module: whose parameters and buffers are filled.
            leave: modules within it whose own are not.
        """
        for owner in module.modules():
            for x in [] if owner in leave else [*owner.parameters(recurse=False), *owner.buffers(recurse=False)]:
                if self.holds(x):
                    value = self._value(x)
                    full = nn.Parameter(value, x.requires_grad) if isinstance(x, nn.Parameter) else value
                    full.__dict__.update(x.__dict__)  # timm and others leave notes there
                    torch.utils.swap_tensors(x, full)

    def holds(self, x: Tensor) -> bool:
        """Whether this tensor is one without values yet."""
        return x.is_meta and _storage(x) in self._steps

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")) == "meta":  # where a large tensor seems to be, next to which this one shall be
            kwargs["device"] = torch.device("cpu")
        tensors = _tensors((args, kwargs))
        deferred = [x for x in tensors if self.holds(x)]
        makes = not tensors and _takes_device(func)
        if not (deferred or makes):
            return func(*args, **kwargs)
        if _needs_values(func) or any(not self.holds(x) for x in _written(func, args, kwargs)):
            return self._at_once(func, args, kwargs)
        given = kwargs.get("generator")
        generator = given if isinstance(given, torch.Generator) else torch.default_generator
        state = generator.get_state() if torch.Tag.nondeterministic_seeded in func.tags else None
        on_meta = dict(tree_map(_to_meta, kwargs)) | ({"device": torch.device("meta")} if _takes_device(func) else {})
        results = func(*tree_map(_to_meta, args), **on_meta)
        if state is not None:
            generator.set_state(state)
        made = _tensors(results)
        if makes and all(x.numel() < self.least for x in made):
            return func(*args, **kwargs)
        if state is not None:  # draws what would have been drawn here, and drops it
            func(*tree_map(self._blank, args), **tree_map(self._blank, kwargs))
        if {_storage(x) for x in made} - self._steps.keys() or _written(func, args, kwargs):  # else another view
            self._note(func, args, kwargs, made, generator, state)
        return results

    def _note(
        self,
        func: Callable[..., object],
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        made: list[Tensor],
        generator: torch.Generator | None = None,
        state: Tensor | None = None,
    ) -> None:
        """Keeps an operation for later, apart from the objects that it was called with: these may change.

        But large tensors with values are kept as they are, for want of memory: weights of a file that is read at once.
        """

        def kept(x: object) -> object:
            if not isinstance(x, Tensor):
                return x
            return x.detach() if x.is_meta else x.clone() if x.numel() < self.least else x

        storages = {_storage(x) for x in [*_tensors((args, kwargs)), *made] if x.is_meta}
        args, kwargs, made = tree_map(kept, (args, dict(kwargs), made))
        versions = _versions(args, kwargs)
        step = _Step(next(self._numbers), func, args, kwargs, made, frozenset(storages), versions, generator, state)
        for storage in storages:
            self._steps.setdefault(storage, []).append(step)

    def _blank(self, x: object) -> object:
        """Something with values in the place of a tensor without, in memory that is used again and again.

        Taken and given back each time it would leave the heap in pieces as large as the network.
        """
        if not isinstance(x, Tensor):
            return x
        size = x.untyped_storage().nbytes()
        if self._scratch.nbytes < size:
            self._scratch = torch.empty(size, dtype=torch.uint8)
        return _view(x, self._scratch.untyped_storage()).zero_()

    def _at_once(self, func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        """Calls a function with the values that its arguments have by now."""

        def of(x: object) -> object:
            return self._value(x) if isinstance(x, Tensor) and self.holds(x) else x

        assert not any(self.holds(x) for x in _written(func, args, kwargs))  # together with tensors that have values
        return func(*tree_map(of, args), **tree_map(of, dict(kwargs)))

    def _value(self, x: Tensor) -> Tensor:
        """Does what was put off for a tensor; nothing else of it is kept."""
        real: dict[int, torch.UntypedStorage] = {}
        for step in self._steps_of(_storage(x)):
            step.do(real)
        return _view(x, real[_storage(x)])

    def _steps_of(self, storage: int) -> list[_Step]:
        """All steps that what is in a storage goes back to, in order."""
        found: dict[int, _Step] = {}
        seen, left = {storage}, [storage]
        while left:
            for step in self._steps[left.pop()]:
                found[step.number] = step
                left += step.storages - seen
                seen |= step.storages
        return [found[number] for number in sorted(found)]

    def _load_file(self, filename: str | PathLike[str], device: str | int = "cpu", **_: str) -> dict[str, Tensor]:
        """As `safetensors.torch.load_file`, for the CPU; large tensors are read when they are filled."""
        found = {}
        with safe_open(filename, framework="np") as file:
            names = list(file.keys())
            parts = {name: file.get_slice(name) for name in names}
            for name, part in parts.items():
                shape, dtype = torch.Size(part.get_shape()), _TYPES.get(part.get_dtype())
                if dtype is None or shape.numel() < self.least:
                    found[name] = _read(filename, name, dtype)
                else:
                    found[name] = torch.empty(shape, dtype=dtype)  # for here it is large, too
                    self._note(_read_into, (found[name], filename, name, dtype), {}, [])
        return found


@dataclass(frozen=True)
class _Step:
    """An operation that was put off.

    Attributes:
        number: orders them.
        function, args, kwargs: what to call; tensors without values are on the meta device.
        made: what it gave there.
        storages: of the tensors without values that it took or gave.
        versions: of the tensors with values that it took.
        generator, state: in front of it, where it draws.
    """

    number: int
    function: Callable[..., object]
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    made: list[Tensor]
    storages: frozenset[int]
    versions: list[int]
    generator: torch.Generator | None
    state: Tensor | None

    def do(self, real: dict[int, torch.UntypedStorage]) -> None:
        """Does it with values, which lie in `real` by the storage that stands for them; adds what it makes."""

        def of(x: object) -> object:
            return _view(x, real[_storage(x)]) if isinstance(x, Tensor) and x.is_meta else x

        assert self.versions == _versions(self.args, self.kwargs)  # else their values are others by now
        args, kwargs = tree_map(of, self.args), tree_map(of, dict(self.kwargs))
        if self.generator is not None and self.state is not None:
            now = self.generator.get_state()
            self.generator.set_state(self.state)
            results = self.function(*args, **kwargs)
            self.generator.set_state(now)
        else:
            results = self.function(*args, **kwargs)
        for x, value in zip(self.made, _tensors(results), strict=True):
            assert x.stride() == value.stride()
            real.setdefault(_storage(x), value.untyped_storage())


def _read(filename: str | PathLike[str], name: str, dtype: torch.dtype | None) -> Tensor:
    """A tensor of a safetensors file. With numpy no memory is taken for the others, which a limit would count."""
    with safe_open(filename, framework="np" if dtype else "pt") as file:
        return torch.from_numpy(file.get_tensor(name)) if dtype else file.get_tensor(name)


def _read_into(x: Tensor, filename: str | PathLike[str], name: str, dtype: torch.dtype | None) -> None:
    x.copy_(_read(filename, name, dtype))


def _tensors(tree: object) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _versions(args: tuple[object, ...], kwargs: Mapping[str, object]) -> list[int]:
    return [x._version for x in _tensors((args, dict(kwargs))) if not x.is_meta]


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _view(x: Tensor, storage: torch.UntypedStorage) -> Tensor:
    """What a tensor on the meta device is a view of, with values."""
    return torch.empty(0, dtype=x.dtype).set_(storage, x.storage_offset(), x.size(), x.stride())


def _to_meta(x: object) -> object:
    return x.to("meta") if isinstance(x, Tensor) else x


def _takes_device(func: torch._ops.OpOverload) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


def _needs_values(func: torch._ops.OpOverload) -> bool:
    """Whether it gives something else than tensors whose shapes follow from shapes."""
    read = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return bool(read & set(func.tags)) or any("Tensor" not in str(x.type) for x in func._schema.returns)


def _written(func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: Mapping[str, object]) -> list[Tensor]:
    """The tensors that it writes into."""
    places = [a for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    at = {a.name: i for i, a in enumerate(func._schema.arguments)}
    given = [args[at[a.name]] if at[a.name] < len(args) else kwargs.get(a.name) for a in places]
    return _tensors(given)
