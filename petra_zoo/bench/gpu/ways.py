"""Ways to save memory in a training step: timm's and torch's, and the same network as a reversible one.

All contenders of a network have its parameters (no trained weights) and see the same images. They are called by name:

    timm                                   all activations stored
    timm, checkpointed                     `set_grad_checkpointing`, as timm has it
    timm, selective checkpointing          convolutions, products and attention stored, all else of a block recomputed
    timm, saved tensors on the host        `torch.autograd.graph.save_on_cpu`, pinned
    timm, compiled                         `torch.compile`, as it comes
    timm, compiled, budget 0.5             the same with half of its `activation_memory_budget`
    petra-zoo, plain                       the reversible network with ordinary autograd
    petra-zoo, reversible                  no activations stored inside runs

Behind our own stands the type of the streams, if it is not the one that they choose: ``petra-zoo, plain, float32``; and
``compiled``, where `compile_branches` was called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import get_args

import timm
import torch
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from petra_zoo.bench.gpu.vision_transformer import ReversibleViT
from petra_zoo.errors import UserError
from petra_zoo.models import PetraRevNet
from petra_zoo.models.layer_arguments import Argument
from petra_zoo.models.memory_modes import Memory
from petra_zoo.reversible import StreamKind
from petra_zoo.settings.merging import did_you_mean

PLAIN, CHECKPOINTED = "timm", "timm, checkpointed"
STREAMS: tuple[StreamKind, ...] = tuple(kind for kind in get_args(StreamKind) if kind != "auto")


@dataclass(frozen=True)
class Network:
    """A ResNet or a vision transformer of timm's, and what it sees.

    Attributes:
        name: timm's.
        image: height and width of its images.
        classes: of its head.
        arguments: further ones, for a small one.
    """

    name: str
    image: int = 224
    classes: int = 1000
    arguments: Mapping[str, Argument] = field(default_factory=dict)

    @property
    def is_transformer(self) -> bool:
        """Whether it is a vision transformer, not a ResNet."""
        return self.name.startswith("vit_")


@dataclass(frozen=True)
class Way:
    """A way to do a training step.

    Attributes:
        build: the network in train mode on a device.
        around: entered around every forward.
        capturable: whether the step can be a CUDA graph at all.
    """

    build: Callable[[Network, torch.device], nn.Module]
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    capturable: bool = True


def our_ways() -> list[str]:
    """Reversible and plain, for every type of the streams; narrow ones first."""
    kinds = sorted(STREAMS, key=lambda kind: kind == "float32")
    return [f"petra-zoo, {memory}, {kind}" for kind in kinds for memory in ("reversible", "plain")]


def compiled_within(budget: float | str) -> str:
    """The name of the way with a part, between 0 and 1, of what torch.compile would store."""
    return f"timm, compiled, budget {budget}"


def find_way(name: str) -> Way:
    """By its name.

    Raises:
        UserError: there is none of that name.
    """
    known = {
        PLAIN: Way(_timm),
        CHECKPOINTED: Way(_checkpointed),
        "timm, selective checkpointing": Way(_selective),
        "timm, saved tensors on the host": Way(_timm, _on_the_host, capturable=False),  # it waits for copies
        "timm, compiled": Way(_compiled),
    }
    memories: tuple[Memory, ...] = ("plain", "reversible")
    kinds: tuple[StreamKind, ...] = ("auto", *STREAMS)
    for memory, kind in product(memories, kinds):
        ours = f"petra-zoo, {memory}" + (f", {kind}" if kind != "auto" else "")
        known[ours] = Way(partial(_ours, memory, kind, False))
        known[f"{ours}, compiled"] = Way(partial(_ours, memory, kind, True))
    if name.startswith(within := compiled_within("")):
        return Way(_compiled, partial(_budget, float(name.removeprefix(within))))
    if name not in known:
        raise UserError(f"no way is called '{name}'; {did_you_mean(name, known)}")
    return known[name]


def _timm(network: Network, device: torch.device) -> ResNet | VisionTransformer:
    size = {"img_size": network.image} if network.is_transformer else {}
    model = _create(network.name, network, **size).to(device).train()
    assert isinstance(model, ResNet | VisionTransformer)
    return model if network.is_transformer else model.to(memory_format=torch.channels_last)


def _create(name: str, network: Network, **more: Argument) -> nn.Module:
    create: Callable[..., nn.Module] = timm.create_model
    return create(name, num_classes=network.classes, **network.arguments, **more)


def _checkpointed(network: Network, device: torch.device) -> nn.Module:
    model = _timm(network, device)
    model.set_grad_checkpointing(True)
    return model


def _selective(network: Network, device: torch.device) -> nn.Module:
    model = _timm(network, device)
    for blocks in _blocks(model):
        for i, block in enumerate(blocks):
            blocks[i] = _Selective(block)
    return model


def _compiled(network: Network, device: torch.device) -> nn.Module:
    torch.compiler.reset()  # what others have compiled counts against the limit of recompilations
    model = _timm(network, device)
    model.compile(backend=_backend(device), dynamic=False)
    return model


def _backend(device: torch.device) -> str:
    # Inductor is what a user gets; on the CPU the same partition of forward and backward, without a compiler's minutes.
    return "inductor" if device.type == "cuda" else "aot_eager_decomp_partition"


def _ours(memory: Memory, streams: StreamKind, compiled: bool, network: Network, device: torch.device) -> nn.Module:
    if network.is_transformer:
        vit = _timm(network, device)
        assert isinstance(vit, VisionTransformer)
        return ReversibleViT(vit, memory, streams)
    model = _create(network.name.replace("resnet", "petra_revnet"), network, streams=streams)
    assert isinstance(model, PetraRevNet)
    model.set_memory(memory)
    if compiled:
        torch.compiler.reset()
        model.compile_branches(_backend(device))
    return model.to(device).to(memory_format=torch.channels_last).train()


def _blocks(model: nn.Module) -> Iterator[nn.Sequential]:
    """The blocks of a ResNet's layers, or of a vision transformer."""
    for name in ("layer1", "layer2", "layer3", "layer4", "blocks"):
        blocks = getattr(model, name, None)
        if isinstance(blocks, nn.Sequential):
            yield blocks


class _Selective(nn.Module):
    """A block that stores the results of what is dear and recomputes what is cheap."""

    DEAR = (
        torch.ops.aten.convolution.default,
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    )

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        contexts = partial(create_selective_checkpoint_contexts, self._policy)
        return checkpoint(self.block, x, use_reentrant=False, context_fn=contexts)

    @classmethod
    def _policy(cls, context: object, operation: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operation in cls.DEAR else CheckpointPolicy.PREFER_RECOMPUTE


def _on_the_host() -> AbstractContextManager[object]:
    return torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())


def _budget(budget: float) -> AbstractContextManager[object]:
    import torch._functorch.config as config

    return config.patch(activation_memory_budget=budget)
