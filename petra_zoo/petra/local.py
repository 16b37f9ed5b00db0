"""Local learning: decoupled greedy learning (Belilovsky, Eickenberg and Oyallon, ICML 2020, arXiv 1901.08164).

Every stage but the last has an auxiliary head and a loss of its own. It learns from them within the tick of its forward
and sends no gradient down: no delay, no reconstruction, nothing in flight but activations on their way up. The method
that PETRA is compared with in the literature; it does not compute the gradient of the network's own loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.petra.generator import seed_generators
from petra_zoo.petra.messages import Down, Up
from petra_zoo.petra.part import Part, StageSettings
from petra_zoo.petra.stage import Stage, leaves
from petra_zoo.petra.stage_state import StageState
from petra_zoo.reversible import Streams, Unit

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

    Raises:
        UserError: the stage's streams have no channels and pixels to average.
    """

    capturable = True

    def __init__(self, part: Part, settings: StageSettings) -> None:
        super().__init__(part, settings)
        self.sends_gradients = False
        self.goes_backward = self.last or any(self.parameters)
        self.auxiliary: AuxiliaryHead | None = None
        if self.last or not self.goes_backward:
            return
        like = next(p for unit in self.units for p in unit.parameters())
        shapes = part.shapes()
        channels = output_width(self.units[-1], shapes[self.first_unit + len(self.units) - 1])
        ((_, classes),) = shapes[-1]  # of the logits
        with torch.random.fork_rng([]):  # the same head whichever process builds it, and whatever was drawn before
            seed_generators(self.settings.seed, self.index, -1, torch.device("cpu"))
            head = AuxiliaryHead(channels, classes)
        self.auxiliary = head.to(like.device, like.dtype)
        self.parameters.append(list(self.auxiliary.parameters()))
        self.gate.watch(m for m in self.auxiliary.modules() if isinstance(m, nn.BatchNorm2d))

    def start_optimizer(self, names: Mapping[int, str]) -> None:
        named = () if self.auxiliary is None else self.auxiliary.named_parameters()
        super().start_optimizer({**names, **{id(p): f"auxiliary.{self.index}.{name}" for name, p in named}})

    def _lowest(self) -> int:
        return len(self.units)  # no unit goes backward by itself: nothing is kept for it

    def forward(self, up: Up) -> Up:
        """Forward, local loss and its gradients; the graph does not outlive the call. A frozen stage learns nothing."""
        if self.auxiliary is None:
            return super().forward(up)
        outputs = self._run(up)
        device = outputs[0].device
        with torch.enable_grad(), self.precision(device), self.surroundings(len(self.units), up.micro_batch, device):
            logits = self.auxiliary(*self.units[-1].values(outputs))
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
            return self.run_units(leaves(up.streams, needs_gradient=False), up.micro_batch)

    def _learn(self, up: Up, logits: Tensor) -> Tensor:
        loss, d_logits = self._loss(logits, up)
        _, found = self._vector_jacobian((logits,), (d_logits,), ())
        self._finish_backward(up.micro_batch, (), (), found)
        return loss

    def state_dict(self) -> StageState:
        return {**super().state_dict(), "auxiliary": self.auxiliary.state_dict() if self.auxiliary else None}

    def load_state_dict(self, state: StageState) -> None:
        if self.auxiliary and state["auxiliary"] is not None:
            self.auxiliary.load_state_dict(state["auxiliary"])
        super().load_state_dict(state)


def output_width(unit: Unit, shapes: Sequence[torch.Size]) -> int:
    """Channels of a unit's output, all streams together.

    Args:
        unit: whose output it is.
        shapes: of its streams.

    Raises:
        UserError: a stream is no [B, C, H, W].
    """
    if any(len(shape) != 4 for shape in shapes):
        found = ", ".join(str(list(shape)) for shape in shapes)
        raise UserError(f"local learning wants streams [B, C, H, W], but unit {unit.name} gives {found}")
    return sum(shape[1] for shape in shapes)
