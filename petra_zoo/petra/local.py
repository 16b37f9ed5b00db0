"""Local learning: decoupled greedy learning (Belilovsky, Eickenberg and Oyallon, ICML 2020, arXiv 1901.08164).

Every stage but the last has an auxiliary head and a loss of its own. It learns from them within the tick of its forward
and sends no gradient down: no delay, no reconstruction, nothing in flight but activations on their way up. The method
that PETRA is compared with in the literature; it does not compute the gradient of the network's own loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petra_zoo.petra.generator import seed_generators
from petra_zoo.petra.messages import Down, Up
from petra_zoo.petra.partition import on_meta
from petra_zoo.petra.stage import Stage, leaves
from petra_zoo.reversible import Streams

_WIDEST = 256


class AuxiliaryHead(nn.Module):
    """Classifies a stage's output: the paper's MLP-SR-aux, narrower.

    Averages to a quarter of the resolution, applies three 1x1 convolutions, averages to 2x2, and ends in an MLP. Its
    layers have the width of the streams but at most 256, and the MLP has one hidden layer, not three: a head must stay
    cheap beside its stage, and behind 2 x 2,048 channels the paper's would have more parameters than the network.

    Args:
        channels: of all streams together.
        num_classes: of the network.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        width = min(channels, _WIDEST)
        convolutions: list[nn.Module] = []
        for n in (channels, width, width):
            convolutions += [nn.Conv2d(n, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.convolutions = nn.Sequential(*convolutions)
        self.mlp = nn.Sequential(nn.Linear(4 * width, width), nn.ReLU(), nn.Linear(width, num_classes))

    def forward(self, *streams: Tensor) -> Tensor:
        """Logits [B, num_classes] from one or two streams [B, C, H, W]."""
        x = torch.cat(streams, dim=1).to(next(self.parameters()).dtype)
        # Never below 2x2: batch norm needs more than one value per channel, even from a single image.
        height, width = (max(2, -(-size // 4)) for size in x.shape[-2:])
        x = F.adaptive_avg_pool2d(x, (height, width))
        x = F.adaptive_avg_pool2d(self.convolutions(x), 2)
        return self.mlp(x.flatten(1))


class LocalStage(Stage):
    """A stage that learns from its own auxiliary head; the last one from the network's head and loss.

    The head's parameters are the stage's: its optimizer, clipping and state have them. They are not the model's.

    Args:
        widths: see `output_widths`.
    """

    def __init__(self, *args: Any, widths: Sequence[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sends_gradients = False
        self.goes_backward = self.last or any(self.parameters)
        self.auxiliary: AuxiliaryHead | None = None
        if self.last or not self.goes_backward:
            return
        like = next(p for unit in self.units for p in unit.parameters())
        with torch.random.fork_rng([]):  # the same head whichever process builds it, and whatever was drawn before
            seed_generators(self.settings.seed, self.index, -1, torch.device("cpu"))
            head = AuxiliaryHead(widths[self.first_unit + len(self.units) - 1], widths[-1])
        self.auxiliary = head.to(like.device, like.dtype)
        self.parameters.append(list(self.auxiliary.parameters()))

    def auxiliary_names(self) -> dict[int, str]:
        """Names of the head's parameters, by id."""
        named = () if self.auxiliary is None else self.auxiliary.named_parameters()
        return {id(p): f"auxiliary.{self.index}.{name}" for name, p in named}

    def _keeps_input(self, i: int) -> bool:
        return False

    def forward(self, up: Up) -> Up:
        """Forward, local loss and its gradients; the graph does not outlive the call. A frozen stage learns nothing."""
        if self.auxiliary is None:
            return super().forward(up)
        outputs = self._run(up)
        with torch.enable_grad(), self.surroundings(len(self.units), up.micro_batch, outputs[0].device):
            logits = self.auxiliary(*outputs)
        self._learn(up, logits)
        return Up(up.micro_batch, tuple(x.detach() for x in outputs), up.labels)

    def forward_backward(self, up: Up) -> tuple[Down, Tensor, Tensor]:
        """The last stage; its message down is empty, and nobody receives it."""
        logits = self._run(up)[0]
        loss = self._learn(up, logits)
        return Down(up.micro_batch, (), ()), loss, logits.detach()

    def _run(self, up: Up) -> Streams:
        if self.watcher:
            self.watcher.saw_forward(self, up)
        with torch.enable_grad():
            return self.evaluate(leaves(up.streams, needs_gradient=False), up.micro_batch)

    def _learn(self, up: Up, logits: Tensor) -> Tensor:
        loss, d_logits = self._loss(logits, up.labels)
        _, found = self._vector_jacobian((logits,), (d_logits,), ())
        self._finish_backward(up.micro_batch, (), (), found)
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "auxiliary": self.auxiliary.state_dict() if self.auxiliary else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.auxiliary:
            self.auxiliary.load_state_dict(state["auxiliary"])
        super().load_state_dict(state)


def output_widths(model: Any, input_size: tuple[int, int, int] | None) -> list[int]:
    """Channels of each unit's output, all streams together; the last one's are the classes.

    Args:
        model: a model with `units()`.
        input_size: [C, H, W] of an image; None for the model's pretrained_cfg.

    Raises:
        ValueError: the size is not known, or a unit's output has no channels and pixels to average.
    """
    size = input_size or getattr(model, "pretrained_cfg", {}).get("input_size")
    if size is None:
        raise ValueError("the model does not say its input size: give input_size=(C, H, W)")
    units, streams = on_meta(model, tuple(size))
    widths = []
    with torch.no_grad():
        for unit in units:
            streams = unit(*streams)
            if unit is not units[-1] and any(x.ndim != 4 for x in streams):
                shapes = ", ".join(str(list(x.shape)) for x in streams)
                raise ValueError(f"local learning wants streams [B, C, H, W], but unit {unit.name} gives {shapes}")
            widths.append(sum(x.shape[1] for x in streams))
    return widths
