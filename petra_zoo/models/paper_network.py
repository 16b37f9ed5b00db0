"""The PETRA paper's networks (arXiv 2406.02052, section 4): RevNets with two different streams from the stem on.

The coupling formula with act = identity and g = 1: no start, no merge, no scaling. The stem is twice as wide as the
ResNet's and splits into two halves, each of ResNet width; down-sampling blocks consume both streams; the head
concatenates them, so features are twice as wide. Every convolution has a bias and torch's default initialisation.
"""

from collections.abc import Sequence
from typing import TypedDict

import torch
import torch.nn.functional as F
from timm.layers import create_classifier, get_device_dtype
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.models.memory_modes import MemoryModes, saves_memory
from petra_zoo.models.paper_blocks import (
    Device,
    DeviceDtype,
    PaperBasicBlock,
    PaperBasicDown,
    PaperBottleneck,
    PaperBottleneckDown,
    TwoStreamLayer,
    WeightsType,
    paper_coupling,
)
from petra_zoo.reversible import CoupledUnit, FunctionUnit, StreamKind, Streams, Unit, backpropagate
from petra_zoo.reversible.stream_type import check_kind

WIDTHS = (64, 128, 256, 512)


class FeatureInfo(TypedDict):
    """What timm knows of a feature map: its channels, by how much it is smaller than the image, and where it is."""

    num_chs: int
    reduction: int
    module: str


class PetraPaperRevNet(MemoryModes, WeightsType):
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
        streams: what carries the streams, see `set_streams`.
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
        streams: StreamKind = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(depths) != len(widths) or not depths or min(depths) < 1:
            raise ValueError(f"one width per layer and at least one block in each: depths={depths}, widths={widths}")
        if stem_type not in ("", "cifar"):
            raise ValueError(f"stem_type is '' or 'cifar', not {stem_type!r}")
        dd: DeviceDtype = {"device": device, "dtype": dtype}
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
        self.feature_info: list[FeatureInfo] = [{"num_chs": stem, "reduction": reduction, "module": "act1"}]
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
        self._use_streams(streams)

    @torch.jit.unused
    def _use_streams(self, streams: StreamKind) -> None:
        if streams == "fixed16":
            raise UserError("streams=fixed16 is for petra_revnet*, the paper's networks have no grid: use bfloat16")
        for module in self.modules():
            if isinstance(module, WeightsType):
                module.kind = check_kind(streams)

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
            if self._goes_by_units(x):
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
        for j, block in enumerate(self.layers[i].children()):
            name = f"layers.{i}.{j}"
            if isinstance(block, PaperBasicBlock | PaperBottleneck):
                units.append(
                    CoupledUnit(
                        name,
                        block,
                        branch=block.run_branch,
                        activate=_identity,
                        coupling=paper_coupling,
                        streams=block.streams,
                    )
                )
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
