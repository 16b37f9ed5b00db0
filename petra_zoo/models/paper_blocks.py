"""Blocks of the PETRA paper's networks (arXiv 2406.02052, section 4), which take and give both streams.

Every convolution has a bias and torch's default initialisation. The reversible ones state (b, a) -> (a + F(b), b) for
TorchScript, tracers and exporters; where memory is saved, a `CoupledUnit` at g = 1 runs their branch.
"""

from typing import TYPE_CHECKING, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petra_zoo.reversible import BranchBlock, StreamType, coupled
from petra_zoo.reversible.stream_type import check_kind, compute_type, scripted_kind, to_carrier

Device = torch.device | str | None


class DeviceDtype(TypedDict):
    """Where parameters are made, and in which type."""

    device: Device
    dtype: torch.dtype | None


class WeightsType(nn.Module):
    """A module whose weights have a type, and which streams go through.

    Attributes:
        kind: what carries them, see `petra_zoo.reversible.StreamType`.
    """

    if TYPE_CHECKING:
        conv1: nn.Conv2d

    def __init__(self) -> None:
        super().__init__()
        self.kind = "auto"

    @torch.jit.unused
    def streams(self) -> StreamType:
        """The type of the streams: what `auto` stands for now is decided."""
        kind = check_kind(self.kind)
        if kind == "auto":  # no grid: a run has two streams from the start, and no place for the grid's exponent
            kind = "bfloat16" if compute_type(self) == torch.bfloat16 else "float32"
        return StreamType(kind=kind)

    def in_weights_type(self, x: Tensor) -> Tensor:
        """x in the type of the module's weights."""
        if torch.jit.is_scripting():
            return x.to(self.conv1.weight.dtype)  # TorchScript has no weights behind a wrapper
        else:
            return self.streams().for_branch(x, self)

    def carried(self, x: Tensor) -> Tensor:
        """x in the type of streams."""
        if torch.jit.is_scripting():
            return to_carrier(x, scripted_kind(self.kind, 0.0, 0.0, x.dtype))
        else:
            return self.streams().carry(x)

    def plus(self, f: Tensor, a: Tensor) -> Tensor:
        """The stream b' = F(b) + a, from F(b)."""
        if torch.jit.is_scripting():
            return self.carried(f) + a
        else:
            return coupled(a, f, a, 1.0, self.streams())


def paper_coupling() -> float:
    """g of every block of the paper's networks."""
    return 1.0


class PaperBasicBlock(WeightsType, BranchBlock):
    """(b, a) -> (a + F(b), b) with F = conv3x3, BN, ReLU, conv3x3, BN, ReLU. Shapes [B, width, H, W]."""

    expansion = 1

    def __init__(self, width: int, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        dd: DeviceDtype = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, **dd)
        self.bn1 = nn.BatchNorm2d(width, **dd)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, **dd)
        self.bn2 = nn.BatchNorm2d(width, **dd)

    def branch(self, b: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(self.in_weights_type(b))))
        return F.relu(self.bn2(self.conv2(x)))

    def forward(self, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        return self.plus(self.branch(b), a), b


class PaperBasicDown(WeightsType):
    """Halves the resolution; F's first convolution doubles as the projection of the stream b.

    With h = ReLU(BN(conv3x3(b))): (b, a) -> (ReLU(BN(conv3x3(h))) + BN(conv1x1(a)), h).
    """

    def __init__(
        self, width_in: int, width: int, stride: int, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        dd: DeviceDtype = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, **dd)
        self.bn1 = nn.BatchNorm2d(width, **dd)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, **dd)
        self.bn2 = nn.BatchNorm2d(width, **dd)
        self.downsample = _projection(width_in, width, stride, dd)

    def forward(self, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.bn1(self.conv1(self.in_weights_type(b))))
        out = F.relu(self.bn2(self.conv2(h))) + self.downsample(self.in_weights_type(a))
        return self.carried(out), self.carried(h)


class _Bottleneck(WeightsType, BranchBlock):
    """F = conv1x1, BN, ReLU, conv3x3, BN, ReLU, conv1x1, BN, ReLU, with a quarter of `width` in the middle."""

    expansion = 4

    def __init__(self, width_in: int, width: int, stride: int, dd: DeviceDtype) -> None:
        super().__init__()
        inner = width // self.expansion
        self.conv1 = nn.Conv2d(width_in, inner, 1, **dd)
        self.bn1 = nn.BatchNorm2d(inner, **dd)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, **dd)
        self.bn2 = nn.BatchNorm2d(inner, **dd)
        self.conv3 = nn.Conv2d(inner, width, 1, **dd)
        self.bn3 = nn.BatchNorm2d(width, **dd)

    def branch(self, b: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(self.in_weights_type(b))))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)))


class PaperBottleneck(_Bottleneck):
    """(b, a) -> (a + F(b), b), F a bottleneck."""

    def __init__(self, width: int, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(width, width, 1, {"device": device, "dtype": dtype})

    def forward(self, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        return self.plus(self.branch(b), a), b


class PaperBottleneckDown(_Bottleneck):
    """Changes resolution or width: (b, a) -> (F(b) + BN(conv1x1(a)), BN(conv1x1(b))); two projections."""

    def __init__(
        self, width_in: int, width: int, stride: int, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        dd: DeviceDtype = {"device": device, "dtype": dtype}
        super().__init__(width_in, width, stride, dd)
        self.downsample = _projection(width_in, width, stride, dd)
        self.downsample_b = _projection(width_in, width, stride, dd)

    def forward(self, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        b, a = self.in_weights_type(b), self.in_weights_type(a)
        out = self.branch(b) + self.downsample(a)
        return self.carried(out), self.carried(self.downsample_b(b))


def _projection(width_in: int, width: int, stride: int, dd: DeviceDtype) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width_in, width, 1, stride, **dd), nn.BatchNorm2d(width, **dd))


class TwoStreamLayer(nn.Sequential):
    """Blocks that take and give both streams."""

    # Two tensors where torch's Sequential takes one.
    def forward(self, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        for block in self:
            b, a = block(b, a)
        return b, a
