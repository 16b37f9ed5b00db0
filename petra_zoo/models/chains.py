"""Finds chains of blocks that keep their shape in any network, by watching one forward on the meta device.

A chain is what the modules of one container do one after the other. A block of it can be reversed where it takes one
tensor, gives one of the same shape, and adds to it: some way from its output back to its input leads through no
convolution or product with weights. VGG-like blocks have no such way; they would be as far from the identity as
anything, and coupled another network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from timm.models import get_model_input_config
from timm.models.regnet import RegStage
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from petra_zoo.errors import UserError
from petra_zoo.models.shared_arguments import Given, Named

Example = Tensor | tuple[Tensor, ...]
# Containers that are no Sequential and do what one does.
SEQUENTIAL_LIKE: set[type[nn.Module]] = {RegStage}
# Nodes of functions whose result is no longer near their input: everything else (sums, norms, activations, layer
# scale, drop path, changes of layout) may lie on the way.
_FAR = ("Convolution", "Conv", "Mm", "Bmm", "Addmm", "Baddbmm", "Linear", "Attention", "Einsum", "Mv")


@dataclass(frozen=True)
class Chain:
    """The modules of a container that are called one after the other.

    Attributes:
        path: the container's name in the network; "" is the network itself.
        names: its modules, in their order.
        runs: those of them that can be reversed, in stretches without another one in between.
        kinds: the classes of those.
        shape: of what runs through the first of them, without the batch.
        obstacle: why the container cannot be replaced by a reversible one; "" if it can.
        one_by_one: whether that is because it is not called itself.
    """

    path: str
    names: tuple[str, ...]
    runs: tuple[tuple[str, ...], ...]
    kinds: tuple[str, ...]
    shape: tuple[int, ...]
    obstacle: str = ""
    one_by_one: bool = False

    @property
    def longest(self) -> int:
        """How many blocks the longest run has."""
        return max(map(len, self.runs))

    @property
    def blocks(self) -> list[str]:
        """Names in the network of the blocks that can be reversed."""
        return [f"{self.path}.{name}".lstrip(".") for run in self.runs for name in run]

    @property
    def opening(self) -> list[str]:
        """Names in the container of the modules that cannot."""
        reversible = {name for run in self.runs for name in run}
        return [name for name in self.names if name not in reversible]


def find_chains(model: nn.Module, example: Example | None = None, *, shortest: int = 3) -> list[Chain]:
    """The chains of a network, those inside of another one's blocks left out; the network is left as it is.

    Args:
        model: any.
        example: what the network takes, [1, ...]; None: an image of the size in its timm configuration.
        shortest: so many blocks one after the other are a chain.

    Raises:
        UserError: there is no example and no configuration.
    """
    found: list[Chain] = []
    for seen in _watched(model, example_of(model, example)):
        inside = any(f"{seen.path}.".startswith(f"{block}.") for chain in found for block in chain.blocks)
        if not inside and (chain := seen.chain(shortest)) is not None:
            found.append(chain)
    return found


def goes_through_blocks(model: nn.Module, paths: Sequence[str], example: Example | None = None) -> bool:
    """Whether timm's `forward_intermediates` calls modules of these containers one by one, not the containers."""
    skeleton = on_meta(model).eval()
    if not callable(forward_intermediates := getattr(skeleton, "forward_intermediates", None)):
        return False
    seen = [_Container(path, skeleton.get_submodule(path)) for path in paths]
    with _hooks(seen):
        try:
            forward_intermediates(example_of(model, example)[0].to("meta"))
        except (NotImplementedError, RuntimeError, TypeError, ValueError):
            return True
    return any(not call.inside for container in seen for call in container.calls)


def example_of(model: nn.Module, example: Example | None) -> tuple[Tensor, ...]:
    """What a network is called with to watch it.

    Raises:
        UserError: nobody says.
    """
    if example is not None:
        given = example if isinstance(example, tuple) else (example,)
        return tuple(_as_its_weights(model, x) for x in given)
    if not (getattr(model, "pretrained_cfg", None) or {}).get("input_size"):
        raise UserError(
            f"{type(model).__name__} does not say what it takes: give example=, a tensor of one input, "
            "for instance torch.zeros(1, 3, 224, 224)"
        )
    weight = next(model.parameters())
    size = get_model_input_config(model)["input_size"]  # as it was built, say with img_size=
    return (torch.zeros(1, *size, device=weight.device, dtype=weight.dtype),)


def _as_its_weights(model: nn.Module, x: Tensor) -> Tensor:
    """Numbers in the type of a model's weights, and where they are; anything else as it is."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if weight is None or not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x.to(weight.device, weight.dtype)


# -- watching ---------------------------------------------------------------------------------------------------------


@dataclass
class _Call:
    """One call of a module in a container.

    Attributes:
        name: the module's in the container.
        inside: it happened in a call of the container.
        given: the tensor that it took, if that was all.
        entered: the node of the graph at which the module began.
        result: the tensor that it gave.
        keeps: that has the shape and the type of what was given.
        near: and is near it: some way leads back through no product with weights.
    """

    name: str
    inside: bool
    given: Tensor | None = None
    entered: Node | None = None
    result: Tensor | None = None
    keeps: bool = False
    near: bool = False


class _Container:
    """What is seen of a container.

    Args:
        path: its name in the network.
        module: the container.
    """

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path, self.module = path, module
        self.calls: list[_Call] = []
        self._depth = 0  # of calls of the container under way
        self._open: list[_Call] = []

    def hooks(self) -> Iterator[RemovableHandle]:
        """Puts hooks on the container and its modules."""
        yield self.module.register_forward_pre_hook(self._enter)
        yield self.module.register_forward_hook(self._leave, always_call=True)
        for name, module in self.module.named_children():
            yield module.register_forward_pre_hook(partial(self._begin, name), with_kwargs=True)
            yield module.register_forward_hook(self._end)

    def _enter(self, module: nn.Module, args: tuple[Given, ...]) -> None:
        self._depth += 1

    def _leave(self, module: nn.Module, args: tuple[Given, ...], output: Given) -> None:
        self._depth -= 1

    def _begin(
        self, name: str, module: nn.Module, args: tuple[Given, ...], kwargs: Named
    ) -> tuple[tuple[Given, ...], Named] | None:
        call = _Call(name, self._depth > 0)
        self.calls.append(call)
        self._open.append(call)
        x = args[0] if args else None
        if not isinstance(x, Tensor) or not x.requires_grad:
            return None
        call.given, start = x, x.clone()
        call.entered = start.grad_fn
        return (start, *args[1:]), kwargs

    def _end(self, module: nn.Module, args: tuple[Given, ...], output: Given) -> None:
        call = self._open.pop()
        if isinstance(output, Tensor) and call.given is not None:
            call.result = output
            call.keeps = output.shape == call.given.shape and output.dtype == call.given.dtype
            call.near = call.keeps and _has_way(output.grad_fn, call.entered)

    def chain(self, shortest: int) -> Chain | None:
        """The chain that the container is, as far as it was seen."""
        runs, obstacle = self._stretches(lambda call: call.near), ""
        one_by_one = isinstance(self.module, nn.ModuleList) or not all(call.inside for call in self.calls)
        if max(map(len, runs), default=0) < shortest:
            runs = self._stretches(lambda call: call.keeps)
            obstacle = "they do not add to their input, as those of VGG do not: coupled, they are another network"
            one_by_one = False
        elif one_by_one:
            obstacle = "the network calls them one by one, not their container"
        if max(map(len, runs), default=0) < shortest:
            return None
        first = next(call.given for call in self.calls if call.name == runs[0][0] and call.given is not None)
        return Chain(
            self.path,
            tuple(self.module._modules),
            tuple(map(tuple, runs)),
            tuple(dict.fromkeys(type(self.module.get_submodule(name)).__name__ for run in runs for name in run)),
            tuple(first.shape[1:]),
            obstacle,
            one_by_one,
        )

    def _stretches(self, fits: Callable[[_Call], bool]) -> list[list[str]]:
        """Names of modules that are called directly one after the other, and all of whose calls fit."""
        misfits = {call.name for call in self.calls if not fits(call)}
        runs: list[list[str]] = []
        before: _Call | None = None
        for call in self.calls:
            if call.name in misfits or not _is_block(self.module.get_submodule(call.name)):
                before = None
                continue
            if before is None or before.result is not call.given:
                runs.append([])
            if not any(call.name in run for run in runs):  # the container may be called several times
                runs[-1].append(call.name)
            before = call
        return [run for run in runs if run]


def _watched(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[_Container]:
    """The containers of a network, seen in one forward: without values where that will do."""
    try:
        return _watch(on_meta(model), tuple(x.to("meta") for x in inputs))
    except (NotImplementedError, RuntimeError):  # it looks at values
        return _watch(model, inputs)


def _watch(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[_Container]:
    seen = [_Container(path, module) for path, module in model.named_modules() if _is_container(module)]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with _hooks(seen), torch.enable_grad():
            model(*(x.detach().requires_grad_(x.is_floating_point()) for x in inputs))
    finally:
        for module, training in modes:
            module.training = training
    return seen


@contextmanager
def _hooks(seen: Sequence[_Container]) -> Iterator[None]:
    """Inside, calls of the containers' modules are noted."""
    handles = [handle for container in seen for handle in container.hooks()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def on_meta(model: nn.Module) -> nn.Module:
    """A copy without any values, for which none were copied."""
    memo: dict[int, Tensor] = {id(x): torch.empty_like(x, device="meta") for x in model.buffers()}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
    skeleton = copy.deepcopy(model, memo).to("meta")
    if callable(switch := getattr(skeleton, "set_grad_checkpointing", None)):
        switch(False)  # it would call the blocks one by one
    return skeleton


def _is_container(module: nn.Module) -> bool:
    known = isinstance(module, nn.ModuleList) or type(module) in SEQUENTIAL_LIKE
    return known or (isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward)


def _is_block(module: nn.Module) -> bool:
    """Whether a module is more than one layer."""
    return next(module.children(), None) is not None and next(module.parameters(), None) is not None


def _has_way(start: Node | None, end: Node | None) -> bool:
    """Whether some way through the graph leads from a result to what it was made of, near it all along."""
    seen: set[Node] = set()
    nodes = [start]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen or any(word in node.name() for word in _FAR):
            continue
        if node is end:
            return True
        seen.add(node)
        nodes += [below for below, _ in node.next_functions]
    return False
