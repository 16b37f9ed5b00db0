"""The PETRA paper's networks (arXiv 2406.02052, section 4): RevNets with two different streams from the stem on.

The coupling formula with act = identity and g = 1: no start, no merge, no scaling. The stem is twice as wide as the
ResNet's and splits into two halves, each of ResNet width; down-sampling blocks consume both streams; the head
concatenates them, so features are twice as wide. Every convolution has a bias and torch's default initialisation.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import create_classifier, get_device_dtype
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from petra_zoo.models.memory_modes import MemoryModes, saves_memory
from petra_zoo.reversible import FLOAT_STREAMS, CoupledUnit, FunctionUnit, Streams, Unit, backpropagate
from petra_zoo.reversible.stream_type import to_carrier

__all__ = ["PetraPaperRevNet"]

WIDTHS = (64, 128, 256, 512)


class _Typed(nn.Module):
    """A module whose weights have a type."""

    if TYPE_CHECKING:
        conv1: nn.Conv2d

    def in_weights_type(self, x: Tensor) -> Tensor:
        """x in the type of the module's weights."""
        if torch.jit.is_scripting():
            return x.to(self.conv1.weight.dtype)  # TorchScript has no weights behind a wrapper
        else:
            return FLOAT_STREAMS.for_branch(x, self)

    def carried(self, x: Tensor) -> Tensor:
        """x in the type of streams."""
        if torch.jit.is_scripting():
            return to_carrier(x)
        else:
            return FLOAT_STREAMS.carry(x)


class PaperBasicBlock(_Typed):
    """(b, a) -> (a + F(b), b) with F = conv3x3, BN, ReLU, conv3x3, BN, ReLU. Shapes [B, width, H, W]."""

    expansion = 1

    def __init__(self, width: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, **dd)
        self.bn1 = nn.BatchNorm2d(width, **dd)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, **dd)
        self.bn2 = nn.BatchNorm2d(width, **dd)

    def branch(self, b: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(self.in_weights_type(b))))
        return F.relu(self.bn2(self.conv2(x)))

    def forward(self, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        return self.branch(b) + a, b


class PaperBasicDown(_Typed):
    """Halves the resolution; F's first convolution doubles as the projection of the stream b.

    With h = ReLU(BN(conv3x3(b))): (b, a) -> (ReLU(BN(conv3x3(h))) + BN(conv1x1(a)), h).
    """

    def __init__(self, width_in: int, width: int, stride: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, **dd)
        self.bn1 = nn.BatchNorm2d(width, **dd)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, **dd)
        self.bn2 = nn.BatchNorm2d(width, **dd)
        self.downsample = _projection(width_in, width, stride, dd)

    def forward(self, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.bn1(self.conv1(self.in_weights_type(b))))
        out = F.relu(self.bn2(self.conv2(h))) + self.downsample(self.in_weights_type(a))
        return self.carried(out), self.carried(h)


class PaperBottleneck(_Typed):
    """(b, a) -> (a + F(b), b) with F = conv1x1, BN, ReLU, conv3x3, BN, ReLU, conv1x1, BN, ReLU."""

    expansion = 4

    if TYPE_CHECKING:  # modules and buffers, which torch types as Tensor | Module

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, width: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        _bottleneck_branch(self, width, width // self.expansion, width, 1, {"device": device, "dtype": dtype})

    def branch(self, b: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(self.in_weights_type(b))))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)))

    def forward(self, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        return self.branch(b) + a, b


class PaperBottleneckDown(_Typed):
    """Changes resolution or width: (b, a) -> (F(b) + BN(conv1x1(a)), BN(conv1x1(b))); two projections."""

    if TYPE_CHECKING:  # modules and buffers, which torch types as Tensor | Module

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, width_in: int, width: int, stride: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        _bottleneck_branch(self, width_in, width // PaperBottleneck.expansion, width, stride, dd)
        self.downsample = _projection(width_in, width, stride, dd)
        self.downsample_b = _projection(width_in, width, stride, dd)

    def forward(self, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        b, a = self.in_weights_type(b), self.in_weights_type(a)
        x = F.relu(self.bn1(self.conv1(b)))
        x = F.relu(self.bn2(self.conv2(x)))
        out = F.relu(self.bn3(self.conv3(x))) + self.downsample(a)
        return self.carried(out), self.carried(self.downsample_b(b))


def _projection(width_in: int, width: int, stride: int, dd: dict[str, Any]) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width_in, width, 1, stride, **dd), nn.BatchNorm2d(width, **dd))


def _bottleneck_branch(
    block: nn.Module, width_in: int, inner: int, width: int, stride: int, dd: dict[str, Any]
) -> None:
    block.conv1 = nn.Conv2d(width_in, inner, 1, **dd)
    block.bn1 = nn.BatchNorm2d(inner, **dd)
    block.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, **dd)
    block.bn2 = nn.BatchNorm2d(inner, **dd)
    block.conv3 = nn.Conv2d(inner, width, 1, **dd)
    block.bn3 = nn.BatchNorm2d(width, **dd)


class TwoStreamLayer(nn.Sequential):
    """Blocks that take and give both streams."""

    # Two tensors where torch's Sequential takes one.
    def forward(self, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        for block in self:
            b, a = block(b, a)
        return b, a


class PetraPaperRevNet(MemoryModes, _Typed):
    """A RevNet as in the PETRA paper.

    Args:
        depths: blocks per layer, any number of layers. A basic first layer has reversible blocks only; every other
            layer begins with a down-sampling block.
        widths: width of one stream per layer, before a bottleneck's expansion by 4.
        bottleneck: bottleneck blocks (RevNet50, 101) instead of basic ones (RevNet18, 34).
        num_classes: 0: no classifier.
        in_chans: channels of the images.
        global_pool: timm's pooling name.
        stem_type: ``''``: 7x7 stride 2 and 2x2 max-pooling; ``'cifar'``: 3x3 stride 1.
        drop_rate: dropout in front of the classifier.
        device: where parameters are made.
        dtype: their type.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 2, 2),
        widths: Sequence[int] = WIDTHS,
        bottleneck: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        stem_type: str = "",
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if len(depths) != len(widths) or not depths or min(depths) < 1:
            raise ValueError(f"one width per layer and at least one block in each: depths={depths}, widths={widths}")
        if stem_type not in ("", "cifar"):
            raise ValueError(f"stem_type is '' or 'cifar', not {stem_type!r}")
        dd = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False

        stem = 2 * widths[0]
        if stem_type == "cifar":
            self.conv1 = nn.Conv2d(in_chans, stem, 3, padding=1, **dd)
        else:
            self.conv1 = nn.Conv2d(in_chans, stem, 7, stride=2, padding=3, **dd)
        self.maxpool = nn.Identity() if stem_type == "cifar" else nn.MaxPool2d(2)
        self.bn1 = nn.BatchNorm2d(stem, **dd)
        self.act1 = nn.ReLU(inplace=True)
        reduction = 1 if stem_type == "cifar" else 2
        self.feature_info: list[dict[str, Any]] = [{"num_chs": stem, "reduction": reduction, "module": "act1"}]
        reduction *= 1 if stem_type == "cifar" else 2

        block, down = (PaperBottleneck, PaperBottleneckDown) if bottleneck else (PaperBasicBlock, PaperBasicDown)
        layers, width_in = [], widths[0]
        for i, (depth, planes) in enumerate(zip(depths, widths, strict=True)):
            width, stride = planes * block.expansion, 1 if i == 0 else 2
            opens = i > 0 or width != width_in
            blocks: list[nn.Module] = [down(width_in, width, stride, **dd)] if opens else []
            blocks += [block(width, **dd) for _ in range(depth - len(blocks))]
            layers.append(TwoStreamLayer(*blocks))
            width_in, reduction = width, reduction * stride
            self.feature_info.append({"num_chs": 2 * width, "reduction": reduction, "module": f"layers.{i}"})
        self.layers = nn.ModuleList(layers)
        self.num_features = 2 * width_in
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Layer groups for layer-wise learning rates."""
        return {"stem": r"^conv1|bn1", "blocks": r"^layers\.(\d+)" if coarse else r"^layers\.(\d+)\.(\d+)"}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that never take weight decay: none beyond what the optimizer factory excludes."""
        return set()

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        """The classifier, or its name."""
        return "fc" if name_only else self.fc

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for `num_classes` (0: none); `global_pool` None keeps the pooling, '' removes it."""
        self.num_classes = num_classes
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        dd = get_device_dtype(self)
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=pool, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_features(self, x: Tensor) -> Tensor:
        """Both streams behind the last layer, concatenated: [B, num_features, H, W]."""
        if not torch.jit.is_scripting():  # TorchScript compiles this test away, and the rest with it
            if saves_memory(self, x):
                return self._join(*self._run(self._feature_units(), (x,)))
        b, a = self._split(self.maxpool(self.act1(self.bn1(self.conv1(x)))))
        for layer in self.layers:
            b, a = layer(b, a)
        return self._join(b, a)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [B, num_classes] from the features, or what the classifier would see."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if not self._goes_beyond_units("forward_features", "forward_head") and saves_memory(self, x):
                return self._run(self.units(), (x,))[0]
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's forward_intermediates: the stem's activation, then both streams behind every layer."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is 'NCHW', not {output_fmt!r}")
        take, last = feature_take_indices(len(self.layers) + 1, indices)
        x = self.act1(self.bn1(self.conv1(x)))
        taps = [x] if 0 in take else []
        streams: Streams = self._split(self.maxpool(x))
        for i, layer in enumerate(self.layers[:last] if stop_early else self.layers, start=1):
            units = self._layer_units(i - 1)
            streams = self._run(units, streams) if saves_memory(self, x) else layer(*streams)
            if i in take:
                taps.append(self._join(*streams))
        return taps if intermediates_only else (self._join(*streams), taps)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the layers behind the last one that `indices` need."""
        take, last = feature_take_indices(len(self.layers) + 1, indices)
        ends_early = last < len(self.layers)
        self.layers = self.layers[:last]
        if last == 0:
            self.maxpool = nn.Identity()
        if ends_early:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or ends_early:
            self.reset_classifier(0, "")
        return take

    @torch.jit.ignore
    def units(self) -> list[Unit]:
        """Stem, blocks and head, in the order in which they run.

        Raises:
            NotImplementedError: a subclass has features of its own, which the units would leave out.
        """
        self._check_units()
        head = {"global_pool": self.global_pool, "fc": self.fc}
        units = [
            *self._feature_units(),
            FunctionUnit("head", lambda *streams: (self.forward_head(self._join(*streams)),), head),
        ]
        for unit in units:
            unit.outside = (self,)
        return units

    @torch.jit.unused
    def _feature_units(self) -> list[Unit]:
        stem = {name: getattr(self, name) for name in ("conv1", "bn1", "act1", "maxpool")}
        units: list[Unit] = [FunctionUnit("stem", self._stem, stem)]
        for i in range(len(self.layers)):
            units += self._layer_units(i)
        return units

    @torch.jit.unused
    def _layer_units(self, i: int) -> list[Unit]:
        units: list[Unit] = []
        layer: Any = self.layers[i]
        for j, block in enumerate(layer):
            name = f"layers.{i}.{j}"
            if isinstance(block, PaperBasicBlock | PaperBottleneck):
                units.append(CoupledUnit(name, block, branch=block.branch, activate=_identity, coupling=_one))
            else:
                units.append(FunctionUnit(name, block.forward, {"block": block}))
        return units

    @torch.jit.unused
    def _run(self, units: list[Unit], streams: Streams) -> Streams:
        return backpropagate(units, streams, reconstruct=self.memory == "reversible")

    @torch.jit.unused
    def _stem(self, x: Tensor) -> Streams:
        return self._split(self.maxpool(self.act1(self.bn1(self.conv1(x)))))

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b, a = self.carried(x).chunk(2, dim=1)
        return b, a

    def _join(self, b: Tensor, a: Tensor) -> Tensor:
        return self.in_weights_type(torch.cat([b, a], dim=1))


def _identity(x: Tensor) -> Tensor:
    return x


def _one() -> float:
    return 1.0


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2406.02052",
        **kwargs,
    }


def _cifar_cfg() -> dict[str, Any]:
    return _cfg(input_size=(3, 32, 32), num_classes=10, pool_size=(4, 4), crop_pct=1.0)


default_cfgs = generate_default_cfgs(
    {
        **{f"petra_revnet{depth}_paper.untrained": _cfg() for depth in (18, 34, 50, 101)},
        **{f"petra_revnet{depth}_paper_cifar.untrained": _cifar_cfg() for depth in (18, 34, 50, 101)},
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> PetraPaperRevNet:
    depths, bottleneck = {
        "18": ((2, 2, 2, 2), False),
        "34": ((3, 4, 6, 3), False),
        "50": ((3, 4, 6, 3), True),
        "101": ((3, 4, 23, 3), True),
    }[variant.removeprefix("petra_revnet").split("_")[0]]
    model_args = {
        "depths": depths,
        "bottleneck": bottleneck,
        "stem_type": "cifar" if variant.endswith("_cifar") else "",
        **kwargs,
    }
    return build_model_with_cfg(
        PetraPaperRevNet, variant, pretrained, feature_cfg={"feature_cls": "getter"}, **model_args
    )


@register_model
def petra_revnet18_paper(pretrained: bool = False, **kwargs: Any) -> PetraPaperRevNet:
    """The PETRA paper's RevNet18 for ImageNet."""
    return _create("petra_revnet18_paper", pretrained, kwargs)


@register_model
def petra_revnet34_paper(pretrained: bool = False, **kwargs: Any) -> PetraPaperRevNet:
    """The PETRA paper's RevNet34 for ImageNet."""
    return _create("petra_revnet34_paper", pretrained, kwargs)


@register_model
def petra_revnet50_paper(pretrained: bool = False, **kwargs: Any) -> PetraPaperRevNet:
    """The PETRA paper's RevNet50 for ImageNet."""
    return _create("petra_revnet50_paper", pretrained, kwargs)


@register_model
def petra_revnet101_paper(pretrained: bool = False, **kwargs: Any) -> PetraPaperRevNet:
    """The PETRA paper's RevNet101 for ImageNet."""
    return _create("petra_revnet101_paper", pretrained, kwargs)


@register_model
def petra_revnet18_paper_cifar(pretrained: bool = False, **kwargs: Any) -> PetraPaperRevNet:
    """The PETRA paper's RevNet18 for 32x32 images."""
    return _create("petra_revnet18_paper_cifar", pretrained, kwargs)


@register_model
def petra_revnet34_paper_cifar(pretrained: bool = False, **kwargs: Any) -> PetraPaperRevNet:
    """The PETRA paper's RevNet34 for 32x32 images."""
    return _create("petra_revnet34_paper_cifar", pretrained, kwargs)


@register_model
def petra_revnet50_paper_cifar(pretrained: bool = False, **kwargs: Any) -> PetraPaperRevNet:
    """The PETRA paper's RevNet50 for 32x32 images."""
    return _create("petra_revnet50_paper_cifar", pretrained, kwargs)


@register_model
def petra_revnet101_paper_cifar(pretrained: bool = False, **kwargs: Any) -> PetraPaperRevNet:
    """The PETRA paper's RevNet101 for 32x32 images."""
    return _create("petra_revnet101_paper_cifar", pretrained, kwargs)
