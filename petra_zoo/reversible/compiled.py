"""Branches under torch.compile, inside the steps that save memory.

torch.compile of a whole network stores what ordinary backpropagation stores. So the branches alone are compiled, and
who calls them goes on saving memory. What a reversal needs is that forward and reversal compute the same bits:

* both run the graph that is built for training, the forward too, which drops what that graph saved. The one for
  inference may be fused in another way and differ in the last bit;
* a batch norm that must not move its statistics moves a copy of them that nobody reads. By its own switch
  (`track_running_stats`) it would be another graph, for which a GPU may choose other kernels.

Blocks of one structure share one function, and structures share none: torch.compile counts compilations per code
object, allows eight, and then falls back to eager operations. Here it is told to raise an error instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import _len_torch_function_stack, _pop_mode_temporarily
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from petra_zoo.errors import UserError
from petra_zoo.reversible.operands import Operand
from petra_zoo.reversible.plain_path import carries_hook
from petra_zoo.reversible.state import ModuleState, Slot

MODES_WITH_GRAPHS = ("reduce-overhead", "max-autotune")


@dataclass(frozen=True)
class CompileOptions:
    """How branches are compiled.

    Attributes:
        backend: torch.compile's.
        mode: torch.compile's; not one of those that replay CUDA graphs of their own, which write over results that
            are still in use here.

    Raises:
        UserError: it is one of those.
    """

    backend: str = "inductor"
    mode: str | None = None

    def __post_init__(self) -> None:
        if self.mode in MODES_WITH_GRAPHS:
            raise UserError(
                f"mode={self.mode!r} replays CUDA graphs of its own, which would write over streams in use: expected "
                "None or 'max-autotune-no-cudagraphs'; a Pipeline captures whole ticks"
            )


class BranchBlock(nn.Module):
    """A block with a branch F: [B, ...] -> [B, ...], which can be compiled.

    Attributes:
        compiled: how; None: not at all. Copies and pickles of the block take it along.
    """

    compiled = None  # no annotation: TorchScript would have to resolve it

    def branch(self, h: Tensor) -> Tensor:
        """F(h), as the operations that it is made of."""
        raise NotImplementedError

    @torch.jit.unused
    def run_branch(self, h: Tensor) -> Tensor:
        """F(h) in a unit: compiled where that is asked for, and nobody has to see its operations."""
        options: CompileOptions | None = self.compiled
        if options is None or not self.training or _needs_operations(h):
            handed = [h]  # a name for h here would keep it alive until the branch is through
            del h
            return self.branch(handed.pop())
        return _CompiledBranch.of(self, "", options)(self, h)


class CallsBranches:
    """Mixin of containers whose blocks are anybody's, and whose units call their branches by `run_branch`."""

    @torch.jit.unused
    def blocks_to_compile(self) -> Sequence[nn.Module]:
        """Those blocks."""
        raise NotImplementedError


def run_branch(
    block: nn.Module, name: str, branch: Callable[..., Tensor], h: Tensor, *args: Operand, **kw: Operand
) -> Tensor:
    """A branch of a block of a `CallsBranches`: compiled where that is asked for, and nobody has to see its operations.

    Args:
        block: holds the branch's parameters.
        name: which of its branches.
        branch: that branch, or the block itself.
        h: [B, ...].
        args: what the branch takes beside it.
        kw: likewise, by name.
    """
    options = compile_options(block)
    if options is None or not block.training or _needs_operations(h):
        return branch(h, *args, **kw)
    return _CompiledBranch.of(block, name, options)(branch, h, *args, **kw)


def compile_options(m: nn.Module) -> CompileOptions | None:
    """How the branches of a block are compiled; None: not at all, or it is no block."""
    found = getattr(m, "compiled", None)
    return found if isinstance(found, CompileOptions) else None


def compile_branches(model: nn.Module, options: CompileOptions | None) -> None:
    """Has the branches of a model's blocks compiled at their next call in a training step; None: no more.

    Raises:
        UserError: the model has no block whose branch can be compiled.
    """
    blocks: list[nn.Module] = [m for m in model.modules() if isinstance(m, BranchBlock)]
    blocks += [block for m in model.modules() if isinstance(m, CallsBranches) for block in m.blocks_to_compile()]
    if not blocks:
        raise UserError(
            f"{type(model).__name__} has no branch that can be compiled: expected blocks in a ReversibleSequential, or "
            "such that inherit from petra_zoo.reversible.BranchBlock"
        )
    for block in blocks:
        vars(block)["compiled"] = options


def _needs_operations(h: Tensor) -> bool:
    """Whether somebody looks at operations now: an outer compiler, a tracer, a transform, a counter."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or h.is_meta
        or torch._C._are_functorch_transforms_active()
        or is_in_torch_dispatch_mode(include_infra_modes=False)
    )


class _CompiledBranch:
    """A compiled branch of a block.

    It does not hold the block, which holds it for as long as it lives.
    """

    _known: ClassVar[WeakKeyDictionary[nn.Module, dict[str, _CompiledBranch]]] = WeakKeyDictionary()

    def __init__(self, block: nn.Module, name: str, options: CompileOptions) -> None:
        self._options, self._children = options, tuple(block._modules.values())
        self._modules = list(block.modules())[1:]
        self._function = _function_of(f"{type(block).__name__}_{name}".rstrip("_"), repr(block), options)
        state = ModuleState(block)
        self._norms = state.norms
        self._statistics = [(norm, state.slots[i]) for i, norm in state.statistics.items()]
        self._scratch: dict[int, Tensor] = {}

    @classmethod
    def of(cls, block: nn.Module, name: str, options: CompileOptions) -> _CompiledBranch:
        """The one of a block as it stands."""
        of_block = cls._known.setdefault(block, {})
        found = of_block.get(name)
        if found is None or found._options != options or found._children != tuple(block._modules.values()):
            found = of_block[name] = cls(block, name, options)
        return found

    def __call__(self, branch: BranchBlock | Callable[..., Tensor], h: Tensor, *args: Operand, **kw: Operand) -> Tensor:
        if any(map(carries_hook, self._modules)):  # it wants to be called with what passes
            return _branch(branch, h, *args, **kw)
        with _no_function_mode(), self._statistics_kept():
            if torch.is_grad_enabled():
                return self._function(branch, h, *args, **kw)
            with torch.enable_grad():  # the graph for training, see above
                return self._function(branch, h.detach().requires_grad_(), *args, **kw).detach()

    @contextmanager
    def _statistics_kept(self) -> Iterator[None]:
        """Inside, norms that must not move their statistics move copies."""
        still = {norm for norm in self._norms if norm.training and not norm.track_running_stats}
        places = {i: slot for i, (norm, slot) in enumerate(self._statistics) if norm in still}
        kept = {i: x for i, (tensors, name) in places.items() if (x := tensors.get(name)) is not None}
        for i, x in kept.items():
            _put(places[i], self._like(i, x))
        for norm in still:
            norm.track_running_stats = True
        try:
            yield
        finally:
            for norm in still:
                norm.track_running_stats = False
            for i, x in kept.items():
                _put(places[i], x)

    def _like(self, i: int, x: Tensor) -> Tensor:
        """The copy that takes the place of statistics: always the same one, at an address that a graph may keep."""
        copy = self._scratch.get(i)
        if copy is None or (copy.shape, copy.dtype, copy.device) != (x.shape, x.dtype, x.device):
            copy = self._scratch[i] = x.detach().clone()
        return copy


def _put(slot: Slot, x: Tensor) -> None:
    tensors, name = slot
    tensors[name] = x


@contextmanager
def _no_function_mode() -> Iterator[None]:
    """Inside, no `TorchFunctionMode` is active: torch.compile would trace it and compile anew for every other one.

    Ours remember and give back batch statistics (`batch_statistics.py`), which a compiled norm computes twice instead.
    """
    with ExitStack() as stack:
        for _ in range(_len_torch_function_stack()):
            stack.enter_context(_pop_mode_temporarily())
        yield


@cache
def _function_of(kind: str, structure: str, options: CompileOptions) -> Callable[..., Tensor]:
    """(block or its branch, h, ...) -> F(h) for blocks that look alike, with a code object of its own."""
    name = f"branch_of_{kind}"
    own = FunctionType(_branch.__code__.replace(co_name=name), _branch.__globals__, name)
    # Static: what a last, smaller batch would make dynamic would serve the full ones too, in their reversal alone.
    return torch.compile(own, fullgraph=True, dynamic=False, backend=options.backend, mode=options.mode)


def _branch(branch: BranchBlock | Callable[..., Tensor], h: Tensor, *args: Operand, **kw: Operand) -> Tensor:
    return branch.branch(h) if isinstance(branch, BranchBlock) else branch(h, *args, **kw)
