"""Residual blocks and layers of timm's ResNet with a coupling: the part of a reversible ResNet that is reversible."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Optional

import torch
from timm.models import register_notrace_function
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from petra_zoo.models.memory_modes import Memory, saves_memory
from petra_zoo.reversible import (
    CoupledUnit,
    FunctionUnit,
    Streams,
    Unit,
    advance,
    as_stream,
    backpropagate,
    couple,
    merge,
    snap,
)

# Both look at a tensor's type or values: torch.fx must not trace into them.
register_notrace_function(as_stream)
register_notrace_function(snap)

COUPLING_STEPS = 256  # a coupling is a multiple of 1/256: exact in bfloat16 and float16


class CoupledBasicBlock(BasicBlock):
    """timm's BasicBlock as a coupled block: takes an activation h, gives the sum before the activation behind it."""

    def branch(self, h: Tensor) -> Tensor:
        """F(h): everything before the addition."""
        x = self.act1(self.drop_block(self.bn1(self.conv1(h.to(self.conv1.weight.dtype)))))
        if self.aa is not None:
            x = self.aa(x)
        x = self.bn2(self.conv2(x))
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        return x

    def activate(self, b: Tensor) -> Tensor:
        """The activation behind the block."""
        return self.act2(b)

    def shortcut(self, h: Tensor) -> Tensor:
        """What is added to the branch where the block changes resolution or width."""
        if self.downsample is not None:
            return self.downsample(h.to(self.conv1.weight.dtype))
        return h

    def forward(self, x: Tensor, a: Optional[Tensor] = None, g: float = 0.0, grid: float = 0.0) -> Tensor:  # noqa: UP045
        """b' from the activation x and, inside a run, the stream a (TorchScript: hence Optional)."""
        f = self.branch(x)
        step = advance(as_stream(self.shortcut(x), self.conv1.weight), f, 0.0 if a is None else g)
        if grid > 0.0:
            step = snap(step, grid)
        return step if a is None else couple(step, a, g)


class CoupledBottleneck(Bottleneck):
    """timm's Bottleneck as a coupled block: takes an activation h, gives the sum before the activation behind it."""

    def branch(self, h: Tensor) -> Tensor:
        """F(h): everything before the addition."""
        x = self.act1(self.bn1(self.conv1(h.to(self.conv1.weight.dtype))))
        x = self.act2(self.drop_block(self.bn2(self.conv2(x))))
        if self.aa is not None:
            x = self.aa(x)
        x = self.bn3(self.conv3(x))
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        return x

    def activate(self, b: Tensor) -> Tensor:
        """The activation behind the block."""
        return self.act3(b)

    shortcut = CoupledBasicBlock.shortcut
    forward = CoupledBasicBlock.forward


CoupledBlock = CoupledBasicBlock | CoupledBottleneck
COUPLED_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    BasicBlock: CoupledBasicBlock,
    Bottleneck: CoupledBottleneck,
}


def couple_block(block: nn.Module) -> nn.Module:
    """Turns timm's BasicBlock or Bottleneck into its coupled form, in place; parameters and names stay.

    Raises:
        ValueError: the block is of another class, or its activation has parameters.
    """
    coupled = COUPLED_BLOCKS.get(type(block))
    if coupled is None:
        raise ValueError(
            f"{type(block).__name__} has no coupled form: only timm's BasicBlock and Bottleneck, exactly, do "
            "(resnet, resnext, wide_resnet, seresnet, ecaresnet and their stems)"
        )
    block.__class__ = coupled
    act: Any = block.act2 if isinstance(block, BasicBlock) else block.act3
    if next(act.parameters(), None) is not None:
        raise ValueError(f"an activation with parameters ({type(act).__name__}) has no coupled form: use relu or silu")
    if hasattr(act, "inplace"):
        act.inplace = False  # its argument lives on as a stream
    return block


class CoupledLayer(nn.Sequential):
    """A ResNet layer whose blocks, behind the down-sampling one, form a run of coupled blocks.

    Takes and gives activations [B, C, H, W], like timm's layers: the run starts and ends inside. In train mode it
    stores no activations inside the run (see `memory`). The coupling is a buffer, in the state dict as ``coupling``;
    a state dict without one is a plain ResNet's and sets it to 0.

    Args:
        blocks: timm BasicBlocks or Bottlenecks; they are turned into their coupled form in place.
        behind_stem: the layer's input is the stem's output, so that its first block may start the run.
        coupling: g, a multiple of 1/256 in [0, 1]; None: 1, and whatever a checkpoint says.
        anchor_every: keep the streams every so many blocks of the run; 0: never.
        grid: > 0 makes the inversion exact at g = 1 (see `petra_zoo.reversible.snap`).
    """

    if TYPE_CHECKING:  # torch types blocks as Module, and modules and buffers as Tensor | Module

        def __getattr__(self, name: str) -> Any: ...

        def __getitem__(self, idx: Any) -> Any: ...

        def __iter__(self) -> Iterator[CoupledBlock]: ...

    def __init__(
        self,
        *blocks: nn.Module,
        behind_stem: bool = False,
        coupling: float | None = None,
        anchor_every: int = 0,
        grid: float = 0.0,
    ) -> None:
        super().__init__(*(couple_block(block) for block in blocks))
        starts = behind_stem and self[0].downsample is None and _idempotent(self[0].activate)
        self.first_reversible = 0 if starts else 1
        self.last = len(self) - 1
        self.anchor_every = anchor_every
        self.grid = grid
        self.memory: Memory = "reversible"
        self.asked_for = coupling
        weight = self[0].conv1.weight
        value = check_coupling(1.0 if coupling is None else coupling)
        self.register_buffer("coupling", torch.full((), value, device=weight.device, dtype=weight.dtype))
        self._g, self._read = value, (self.coupling, self.coupling._version)

    @torch.jit.unused
    def g(self) -> float:
        """The coupling as a number, read back from the buffer only when the buffer has changed."""
        buffer = self.coupling
        if (
            not isinstance(buffer, Tensor) or buffer.is_meta or torch.compiler.is_compiling()
        ):  # traced: a torch.fx.Proxy
            return self._g
        version = -1 if buffer.is_inference() else buffer._version
        if buffer is not self._read[0] or version != self._read[1]:
            self._g, self._read = check_coupling(float(buffer)), (buffer, version)
        return self._g

    def set_coupling(self, g: float) -> None:
        """Sets g, a multiple of 1/256 in [0, 1]."""
        with torch.no_grad():
            self.coupling.fill_(check_coupling(g))

    def forward(self, h: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            g = float(self.coupling)
        else:
            if saves_memory(self, h):
                return self._forward_units(h)
            g = self.g()
        a: Optional[Tensor] = None  # noqa: UP045 - TorchScript
        b = h
        for i, block in enumerate(self):
            if i == 0:  # the same as `enter`, which TorchScript cannot call here
                b = as_stream(h, block.conv1.weight)
                if self.grid > 0.0 and self.first_reversible == 0:
                    b = snap(b, self.grid)
                h = b
            entering = b
            b = block(h, a, g, self.grid)
            if g > 0.0 and i >= self.first_reversible:
                a = entering
            h = block.activate(b)
            if i == self.last:
                if a is not None:
                    h = merge(h, block.activate(a), g)
                h = h.to(block.conv1.weight.dtype)
        return h

    @torch.jit.unused
    def _forward_units(self, h: Tensor) -> Tensor:
        units = [*self.units("layer", lambda h: h), FunctionUnit("merge", lambda *streams: (self.merge(streams),), {})]
        return backpropagate(units, (self.enter(h),), reconstruct=self.memory == "reversible")[0]

    @torch.jit.unused
    def enter(self, h: Tensor) -> Tensor:
        """The stream b that an activation becomes in front of the layer."""
        b = as_stream(h, self[0].conv1.weight)
        return snap(b, self.grid) if self.grid > 0.0 and self.first_reversible == 0 else b

    @torch.jit.unused
    def merge(self, streams: Streams) -> Tensor:
        """The activation [B, C, H, W] that the layer hands on, from the streams behind its last block."""
        last = self[self.last]
        h = last.activate(streams[0])
        if len(streams) == 2:
            h = merge(h, last.activate(streams[1]), self.g())
        return h.to(last.conv1.weight.dtype)

    @torch.jit.unused
    def units(self, name: str, enter: Callable[..., Tensor]) -> list[Unit]:
        """The layer's blocks as units.

        Args:
            name: the layer's name in its model.
            enter: what the first unit applies to the streams it gets (the merge of the layer before).
        """
        units: list[Unit] = []
        for i, block in enumerate(self):
            if i < self.first_reversible:
                units.append(FunctionUnit(f"{name}.{i}", _opening(block, enter, self.grid), {"block": block}))
                continue
            run_index = i - self.first_reversible
            units.append(
                CoupledUnit(
                    f"{name}.{i}",
                    block,
                    branch=block.branch,
                    activate=enter if i == 0 else self[i - 1].activate,
                    coupling=self.g,
                    starts=run_index == 0,
                    anchor=self.anchor_every > 0 and run_index > 0 and run_index % self.anchor_every == 0,
                    grid=self.grid,
                )
            )
        return units

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "coupling"
        if key not in state_dict and any(name.startswith(prefix) for name in state_dict):
            state_dict[key] = torch.zeros_like(self.coupling)  # a plain ResNet's layer: the ResNet's function
        if self.asked_for is not None and key in state_dict and float(state_dict[key]) != self.asked_for:
            error_msgs.append(
                f"{key} is {float(state_dict[key]):g} in the checkpoint (0: a plain ResNet), but the model was built "
                f"with coupling={self.asked_for:g}: leave coupling out, or convert the checkpoint"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def check_coupling(g: float) -> float:
    """Returns g.

    Raises:
        ValueError: g is not a multiple of 1/256 in [0, 1].
    """
    if not (0.0 <= g <= 1.0 and g * COUPLING_STEPS == int(g * COUPLING_STEPS)):
        raise ValueError(f"a coupling is a multiple of 1/256 between 0 and 1, not {g!r}")
    return float(g)


def _opening(block: nn.Module, enter: Callable[..., Tensor], grid: float) -> Callable[..., Streams]:
    return lambda *streams: (block(enter(*streams), None, 0.0, grid),)


def _idempotent(activate: Callable[[Tensor], Tensor]) -> bool:
    """act(act(x)) = act(x): only then can a run start from the activation that the stem hands on."""
    once = activate(torch.linspace(-9.0, 9.0, 181, device="cpu"))
    return torch.equal(activate(once), once)
