"""The vector-Jacobian product of a unit's graph, and what that graph reads."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from petra_zoo.reversible.operands import Operand
from petra_zoo.reversible.ownership import apart
from petra_zoo.reversible.state import ModuleState

Gradients = tuple[Tensor | None, ...]
Wanted = Tensor | GradientEdge
Differentiable = Wanted | None  # a value, or the place in the graph where its gradient enters


def edge_of(y: Tensor) -> GradientEdge | None:
    """The place where y's gradient enters the graph: it can be kept without y. None: y has no graph."""
    return get_gradient_edge(y) if y.requires_grad else None


def gradients_of(outputs: Sequence[Differentiable], output_gradients: Gradients, wanted: Sequence[Wanted]) -> Gradients:
    """The vector-Jacobian product of outputs with respect to what is wanted; None counts as zero, both ways.

    No two of the gradients share memory, and none does with those given.
    """
    pairs = [(y, d) for y, d in zip(outputs, output_gradients, strict=True) if d is not None and _has_graph(y)]
    if not pairs or not wanted:
        return (None,) * len(wanted)
    ys, ds = zip(*pairs, strict=True)
    # Parameters as they are, for they are many and their edge is found by a view each.
    inputs: list[Operand] = [x if isinstance(x, nn.Parameter | GradientEdge) else get_gradient_edge(x) for x in wanted]
    return apart(torch.autograd.grad(ys, inputs, ds, allow_unused=True), ds)


def _has_graph(y: Differentiable) -> bool:
    return y.requires_grad if isinstance(y, Tensor) else y is not None


_looked_at: WeakSet[nn.Module] = WeakSet()


def require_known_reads(
    reader: nn.Module,
    name: str,
    ends: Sequence[GradientEdge | None],
    state: ModuleState,
    wanted: Sequence[Wanted],
) -> None:
    """Looks through a graph, once for a module.

    Args:
        reader: whose graph it is.
        name: of its unit.
        ends: where gradients enter the graph.
        state: what its modules hold.
        wanted: where gradients are asked for.

    Raises:
        RuntimeError: another leaf wants gradients.
    """
    if reader in _looked_at:
        return
    known = [*wanted, *(x for x in state.tensors() if x is not None and x.requires_grad)]
    leaves = {id(x) for x in known if _is_leaf(x)}
    edges = [x if isinstance(x, GradientEdge) else get_gradient_edge(x) for x in known if not _is_leaf(x)]
    seen: set[Node] = {edge.node for edge in edges}
    nodes = [edge.node for edge in ends if edge is not None]
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and id(leaf) not in leaves:
            raise RuntimeError(
                f"{name} reads a parameter of shape {list(leaf.shape)} that none of its modules holds, and that would "
                "not be trained: make it a parameter or sub-module of the block, or call model.set_memory('plain') "
                "first"
            )
        nodes += [below for below, _ in node.next_functions if below is not None]
    _looked_at.add(reader)


def _is_leaf(x: Wanted) -> bool:
    return isinstance(x, Tensor) and x.is_leaf
