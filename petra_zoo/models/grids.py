"""Choosing the grid of streams in 16 bits by how large they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.models.coupled_layer import CoupledLayer
from petra_zoo.models.layer_parts import first_stream
from petra_zoo.models.reversible_sequential import ReversibleSequential
from petra_zoo.models.shared_arguments import Given, Named
from petra_zoo.reversible import Streams, untouched
from petra_zoo.reversible.packed import MOST

FINEST = 14  # steps of 2**-14, up to 2
Layer = CoupledLayer | ReversibleSequential


def choose_grids(model: nn.Module, layers: Sequence[Layer], images: Tensor, headroom: float) -> None:
    """Gives every layer the finest grid whose range is `headroom` times the largest value of its streams.

    They are measured in float32, in the model's mode, whose buffers and generators stay as they are. An untrained
    network's grow by more than any headroom once its branches count: leave it the default grid.

    Args:
        model: on any device.
        layers: of the model.
        images: [B, C, H, W], normalised, as many as memory allows.
        headroom: at least 1.

    Raises:
        UserError: a stream is not finite, or too large for any grid.
    """
    peaks = [_Peak(layer, images.device) for layer in layers]
    with ExitStack() as stack:
        for peak in peaks:
            stack.enter_context(peak.measured())
        stack.enter_context(untouched(model))
        stack.enter_context(torch.random.fork_rng([images.device] if images.is_cuda else []))
        stack.enter_context(torch.no_grad())
        model(images)
    for peak in peaks:
        value = float(peak.value) * headroom
        if not 0.0 <= value <= MOST:
            raise UserError(f"a stream of up to {float(peak.value):g} fits no grid in 16 bits: use float32 streams")
        peak.layer.set_exponent(FINEST if value == 0.0 else min(FINEST, math.floor(math.log2(MOST / value))))


class _Peak:
    """The largest absolute value of a layer's streams."""

    def __init__(self, layer: Layer, device: torch.device) -> None:
        self.layer = layer
        self.value = torch.zeros((), device=device)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Inside, what goes through the layer is measured, as float32."""
        kind, self.layer.kind = self.layer.kind, "float32"
        if isinstance(self.layer, CoupledLayer):
            blocks = list(self.layer.children())
            hooks = [block.register_forward_hook(lambda _, inputs, b: self._see(b)) for block in blocks]
            if self.layer.starts:
                hooks.append(blocks[0].register_forward_hook(lambda _, inputs, b: self._see(inputs[0])))
        else:  # its blocks know nothing of streams
            hooks = [self.layer.register_forward_pre_hook(partial(self._run, self.layer), with_kwargs=True)]
        try:
            yield
        finally:
            self.layer.kind = kind
            for hook in hooks:
                hook.remove()

    def _run(self, layer: ReversibleSequential, _: nn.Module, args: tuple[Tensor, ...], kwargs: Named) -> None:
        shared: tuple[Given, ...] = args[1:]
        units, _leave = layer.units("blocks", first_stream, shared, named=kwargs)
        streams: Streams = (layer.enter(args[0]),)
        self._see(streams[0])
        for unit in units:
            streams = unit(*streams)
            self._see(streams[0])

    def _see(self, stream: Tensor) -> None:
        self.value = torch.maximum(self.value, stream.detach().abs().amax().float())
