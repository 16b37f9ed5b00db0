"""Reversible ResNets: timm's ResNet with coupled layers.

`PetraRevNet` is timm's `ResNet` with every layer turned into a `CoupledLayer`: same constructor, same parameter names,
same variants (deep stems, ResNeXt, SE, anti-aliasing, group norm, dilation, ...). A plain ResNet's state dict loads and
gives the ResNet's function (coupling 0); trained from scratch the coupling is 1, PETRA's. ``pretrained=True`` takes
timm's weights of the ResNet and couples them while they load (`resnet_weights.py`); ``coupling=0`` keeps its function.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_device_dtype
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.models.coupled_block import CoupledBlock
from petra_zoo.models.coupled_layer import CoupledLayer
from petra_zoo.models.grids import choose_grids
from petra_zoo.models.layer_arguments import Argument, Arguments, from_words
from petra_zoo.models.layer_parts import Enter, first_stream
from petra_zoo.models.memory_modes import Memory, MemoryModes
from petra_zoo.models.resnet_weights import choose_couplings, couple_weights, has_couplings
from petra_zoo.models.timm_twins import twin_cfgs
from petra_zoo.reversible import FunctionUnit, StreamKind, Streams, Unit

__all__ = ["PetraRevNet"]

_T = TypeVar("_T")

LAYERS = ("layer1", "layer2", "layer3", "layer4")
DIGITS_WEIGHTS = Path(__file__).parent / "weights" / "petra_revnet_tiny.digits.safetensors"  # in the wheel


class PetraRevNet(MemoryModes, ResNet):
    """A reversible ResNet.

    In train mode the forward stores no activations inside runs of coupled blocks; stem, down-sampling blocks and head
    are recomputed from their input.

    Args:
        block: timm's BasicBlock or Bottleneck.
        layers: blocks per layer.
        stem_type: timm's, or ``'cifar'``: 3x3 convolution of `stem_width` channels, stride 1, no pooling.
        coupling: g of every layer or one per layer; None: 1, and whatever a checkpoint says (a pretrained ResNet's:
            0 or 1/8, by the run's length).
        anchor_every: keep the streams every so many blocks of a run (one number, or one per layer); 0: never.
        exact: reconstruct to the bit, by rounding steps to multiples of 2**-exact_bits; at g = 1 that is all, at
            g = 2**-m m bits per element and block are stored, rounded up to 1, 2, 4 or 8. There is no other g > 0.
        exact_bits: the grid of `exact`; streams must stay below 2**(24 - exact_bits) in float32.
        streams: what carries the streams, see `set_streams`.
        **kwargs: timm's `ResNet` arguments; unknown ones raise TypeError.
    """

    if TYPE_CHECKING:
        pretrained_cfg: Arguments  # timm's builder sets it

    def __init__(
        self,
        block: type[nn.Module],
        layers: Sequence[int],
        *args: Argument,
        stem_type: str = "",
        coupling: float | Sequence[float] | None = None,
        anchor_every: int | Sequence[int] = 0,
        exact: bool = False,
        exact_bits: int = 12,
        streams: StreamKind = "auto",
        **kwargs: Argument,
    ) -> None:
        init: Argument = super().__init__  # timm's annotations ask for an instance of the block, not its class
        if stem_type == "cifar":
            # timm's plain stem is always 64 wide; its deep stem has twice stem_width, and its convolutions go.
            width = kwargs.pop("stem_width", 64)
            init(block, layers, *args, stem_type="deep", stem_width=width // 2, **kwargs)
            self._use_cifar_stem(width)
        else:
            init(block, layers, *args, stem_type=stem_type, **kwargs)
        self._couple(coupling, anchor_every, 2.0**-exact_bits if exact else 0.0, streams)

    @classmethod
    def from_resnet(
        cls, source: ResNet, coupling: float | Sequence[float] = 0.0, anchor_every: int | Sequence[int] = 0
    ) -> "PetraRevNet":
        """A coupled copy of a timm ResNet; with coupling 0 it computes the same to the bit.

        Raises:
            UserError: a block is neither BasicBlock nor Bottleneck, exactly.
        """
        if type(source) is not ResNet:
            raise UserError(f"expected a timm ResNet, got {type(source).__name__}")
        model = copy.deepcopy(source)
        model.__class__ = cls
        assert isinstance(model, cls)
        model._couple(coupling, anchor_every)
        return model

    def _use_cifar_stem(self, width: int) -> None:
        old = self.conv1[0]
        conv = nn.Conv2d(self.in_chans, width, 3, padding=1, bias=False, **get_device_dtype(old))
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        self.add_module("conv1", conv)
        self.add_module("maxpool", nn.Identity())
        infos: list[Arguments] = self.feature_info
        for i, info in enumerate(infos):
            info["reduction"] = max(1, info["reduction"] // (2 if i == 0 else 4))

    def _couple(
        self,
        coupling: float | Sequence[float] | None,
        anchor_every: int | Sequence[int],
        grid: float = 0.0,
        streams: StreamKind = "auto",
    ) -> None:
        couplings = _one_per_layer(coupling, "coupling")
        anchors = _one_per_layer(anchor_every, "anchor_every")
        for i, name in enumerate(LAYERS):
            blocks = getattr(self, name)
            layer = CoupledLayer(
                *blocks,
                behind_stem=i == 0,
                coupling=couplings[i],
                anchor_every=anchors[i] or 0,
                grid=grid,
                streams=streams,
            )
            setattr(self, name, layer.train(blocks.training))

    def __setattr__(self, name: str, value: Argument) -> None:
        """A layer's blocks in a Sequential of somebody's own, ``nn.Sequential(*model.layer1, extra)``, stay coupled."""
        if name in LAYERS and type(value) is nn.Sequential and any(isinstance(m, CoupledBlock) for m in value):
            layer = self._modules.get(name)
            if isinstance(layer, CoupledLayer):
                value = layer.with_blocks(dict(value._modules))
        super().__setattr__(name, value)

    @torch.jit.ignore
    def set_memory(self, memory: Memory) -> None:
        super().set_memory(memory)
        for layer in self.coupled_layers():
            layer.memory = memory

    def coupled_layers(self) -> list[CoupledLayer]:
        """The layers that are left (`prune_intermediate_layers` empties some)."""
        return list(self.named_layers().values())

    def named_layers(self) -> dict[str, CoupledLayer]:
        """`coupled_layers` by name."""
        layers = ((name, getattr(self, name)) for name in LAYERS)
        return {name: layer for name, layer in layers if isinstance(layer, CoupledLayer)}

    def set_anchors(self, anchors: Sequence[int]) -> None:
        """Keeps the streams every so many blocks of each layer's run, in this network and in copies that are saved."""
        for layer, anchor_every in zip(self.coupled_layers(), anchors, strict=True):
            layer.anchor_every = anchor_every
        self._is_built_with("anchor_every", list(anchors) if any(anchors) else None)

    @torch.jit.unused
    def _use_streams(self, streams: StreamKind) -> None:
        for layer in self.coupled_layers():
            layer.set_streams(streams)

    def choose_grids(self, images: Tensor, headroom: float = 4.0) -> None:
        """Sets the grids of fixed16 streams by what the streams are for images [B, C, H, W]; see `choose_grids`."""
        choose_grids(self, self.coupled_layers(), images, headroom)

    def check_streams(self) -> None:
        """Reads what streams on a grid have seen of its range, and waits for the device; pipelines do it by themselves.

        Raises:
            UserError: a value was beyond it since the last time.
        """
        for layer in self.coupled_layers():
            layer.check_streams()

    def set_coupling(self, coupling: float | Sequence[float]) -> None:
        """Sets g of every layer, or one per layer."""
        values = _one_per_layer(coupling, "coupling")
        for layer, g in zip(self.coupled_layers(), values, strict=False):
            layer.set_coupling(g)
        self._is_built_with("coupling", None)  # the state dict has it

    @torch.jit.ignore
    def init_weights(self, *args: Argument, **kwargs: Argument) -> None:
        """timm's initialisation; couplings become those of a newly built model."""
        super().init_weights(*args, **kwargs)
        for layer in self.coupled_layers():
            layer.reset_coupling()

    def units(self) -> list[Unit]:
        """Stem, blocks and head, in the order in which they run.

        Running them one after the other, from the same generator state, equals `model(x)` bit for bit.

        Raises:
            NotImplementedError: a subclass has features of its own, which the units would leave out.
        """
        self._check_units()
        stem = {name: getattr(self, name) for name in ("conv1", "bn1", "act1", "maxpool")}
        first = self.layer1
        enters = first.streams if isinstance(first, CoupledLayer) and first.starts else None
        units: list[Unit] = [FunctionUnit("stem", self._stem, stem, enters)]
        leave: Enter = first_stream  # from the streams behind a layer to the activation it hands on
        for name in LAYERS:
            layer = getattr(self, name)
            if isinstance(layer, CoupledLayer):
                of_layer, leave = layer.units(name, leave)
                units += of_layer
            elif not isinstance(layer, nn.Identity):  # somebody's own: a unit without an inverse
                units.append(FunctionUnit(name, _whole(layer, leave), {name: layer}))
                leave = first_stream
        head = {"global_pool": self.global_pool, "fc": self.fc}
        units.append(FunctionUnit("head", _whole(self.forward_head, leave), head))
        outside = (self, *self.coupled_layers())
        for unit in units:
            unit.outside = outside
        return units

    def _stem(self, x: Tensor) -> Streams:
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        layer = self.layer1
        return (layer.enter(x),) if isinstance(layer, CoupledLayer) else (x,)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # TorchScript compiles this test away, and the rest with it
            if self._goes_by_units(x):
                return self._run_units(self.units(), x)[0]
        return self.forward_head(self.forward_features(x))


def _whole(layer: Callable[[Tensor], Tensor], enter: Enter) -> Callable[..., Streams]:
    def function(*streams: Tensor) -> Streams:
        h = enter(*streams)
        return (layer(h.clone() if h is streams[0] else h),)  # it may write into its argument, not into a stream

    return function


def _one_per_layer(value: _T | Sequence[_T], name: str) -> list[_T]:
    if not isinstance(value, Sequence):
        return [value] * len(LAYERS)
    if len(value) != len(LAYERS):
        raise ValueError(f"{name} is one number or {len(LAYERS)}, one per layer; got {len(value)}")
    return list(value)


def _cfg(size: int = 224, **kwargs: Argument) -> Arguments:
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "apache-2.0",
        **kwargs,
    }


def _cifar_cfg(**kwargs: Argument) -> Arguments:
    return _cfg(32, **{"num_classes": 10, "pool_size": (4, 4), "crop_pct": 1.0, **kwargs})


default_cfgs = generate_default_cfgs(
    {
        **twin_cfgs("petra_revnet18", "resnet18"),
        **twin_cfgs("petra_revnet34", "resnet34"),
        **twin_cfgs("petra_revnet50", "resnet50"),
        **twin_cfgs("petra_revnet101", "resnet101"),
        **twin_cfgs("petra_revnet152", "resnet152"),
        "petra_revnet18_cifar.untrained": _cifar_cfg(),
        "petra_revnet34_cifar.untrained": _cifar_cfg(),
        "petra_revnet50_cifar.untrained": _cifar_cfg(),
        "petra_revnet_tiny.digits": _cifar_cfg(
            file=str(DIGITS_WEIGHTS),
            input_size=(3, 8, 8),
            pool_size=(1, 1),
            interpolation="bicubic",
            mean=(0.305,) * 3,
            std=(0.376,) * 3,
            label_names=tuple("0123456789"),
        ),
    }
)


def _couple_pretrained(weights: dict[str, Tensor], model: PetraRevNet, *, anchor: bool) -> dict[str, Tensor]:
    """timm's `pretrained_filter_fn`: a plain ResNet's weights become coupled; `anchor`: so do the model's anchors."""
    layers = model.named_layers()
    if has_couplings(weights, layers):
        return weights
    chosen = choose_couplings(layers)
    if anchor:
        model.set_anchors(chosen.anchors)
    return couple_weights(weights, layers, chosen.couplings)


def _create(variant: str, pretrained: bool, model_args: Arguments, kwargs: Arguments) -> PetraRevNet:
    return build_model_with_cfg(
        PetraRevNet,
        variant,
        pretrained,
        pretrained_filter_fn=partial(_couple_pretrained, anchor="anchor_every" not in kwargs),
        feature_cfg={"feature_cls": "getter"},
        **from_words({**model_args, **kwargs}),
    )


@register_model
def petra_revnet18(pretrained: bool = False, **kwargs: Argument) -> PetraRevNet:
    """Reversible ResNet-18: the parameters of timm's resnet18."""
    return _create("petra_revnet18", pretrained, {"block": BasicBlock, "layers": (2, 2, 2, 2)}, kwargs)


@register_model
def petra_revnet34(pretrained: bool = False, **kwargs: Argument) -> PetraRevNet:
    """Reversible ResNet-34: the parameters of timm's resnet34."""
    return _create("petra_revnet34", pretrained, {"block": BasicBlock, "layers": (3, 4, 6, 3)}, kwargs)


@register_model
def petra_revnet50(pretrained: bool = False, **kwargs: Argument) -> PetraRevNet:
    """Reversible ResNet-50: the parameters of timm's resnet50."""
    return _create("petra_revnet50", pretrained, {"block": Bottleneck, "layers": (3, 4, 6, 3)}, kwargs)


@register_model
def petra_revnet101(pretrained: bool = False, **kwargs: Argument) -> PetraRevNet:
    """Reversible ResNet-101: the parameters of timm's resnet101."""
    return _create("petra_revnet101", pretrained, {"block": Bottleneck, "layers": (3, 4, 23, 3)}, kwargs)


@register_model
def petra_revnet152(pretrained: bool = False, **kwargs: Argument) -> PetraRevNet:
    """Reversible ResNet-152: the parameters of timm's resnet152."""
    return _create("petra_revnet152", pretrained, {"block": Bottleneck, "layers": (3, 8, 36, 3)}, kwargs)


@register_model
def petra_revnet18_cifar(pretrained: bool = False, **kwargs: Argument) -> PetraRevNet:
    """Reversible ResNet-18 for 32x32 images: 3x3 stem, no pooling."""
    return _create(
        "petra_revnet18_cifar", pretrained, {"block": BasicBlock, "layers": (2, 2, 2, 2), "stem_type": "cifar"}, kwargs
    )


@register_model
def petra_revnet34_cifar(pretrained: bool = False, **kwargs: Argument) -> PetraRevNet:
    """Reversible ResNet-34 for 32x32 images: 3x3 stem, no pooling."""
    return _create(
        "petra_revnet34_cifar", pretrained, {"block": BasicBlock, "layers": (3, 4, 6, 3), "stem_type": "cifar"}, kwargs
    )


@register_model
def petra_revnet50_cifar(pretrained: bool = False, **kwargs: Argument) -> PetraRevNet:
    """Reversible ResNet-50 for 32x32 images: 3x3 stem, no pooling."""
    return _create(
        "petra_revnet50_cifar", pretrained, {"block": Bottleneck, "layers": (3, 4, 6, 3), "stem_type": "cifar"}, kwargs
    )


@register_model
def petra_revnet_tiny(pretrained: bool = False, **kwargs: Argument) -> PetraRevNet:
    """A small reversible ResNet (0.2 M parameters, 14 units) for images of 8x8 to 32x32."""
    model_args = {
        "block": BasicBlock,
        "layers": (3, 3, 3, 3),
        "channels": (16, 24, 32, 48),
        "stem_type": "cifar",
        "stem_width": 16,
    }
    return _create("petra_revnet_tiny", pretrained, model_args, kwargs)
