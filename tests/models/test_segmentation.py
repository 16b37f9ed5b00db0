"""segmentation_models_pytorch builds its networks on ours (the extra `segmentation`)."""

from typing import Any

import pytest
import torch
from torch import Tensor

import petra_zoo  # noqa: F401 - registers the models

smp = pytest.importorskip("segmentation_models_pytorch", reason="needs the extra 'segmentation'")


def unet(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    return smp.Unet("tu-petra_revnet18", encoder_weights=None, classes=3, **kwargs)


def images(size: int = 64) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_the_encoder_gives_one_map_per_reduction() -> None:
    encoder = unet().encoder.eval()
    with torch.no_grad():
        maps = encoder(images())
    assert [tuple(x.shape[1:]) for x in maps] == [
        (3, 64, 64),
        (64, 32, 32),
        (64, 16, 16),
        (128, 8, 8),
        (256, 4, 4),
        (512, 2, 2),
    ]
    assert encoder.out_channels == [3, 64, 64, 128, 256, 512]


def test_a_unet_trains_through_the_reversible_encoder() -> None:
    """Its gradients are those of the same network with all activations stored, and reach every parameter."""
    gradients = {}
    for memory in ("plain", "reversible"):
        model = unet(encoder_depth=4, decoder_channels=(32, 16, 16, 8)).double().train()
        model.encoder.model.model.set_memory(memory)
        masks = model(images().double())
        assert masks.shape == (2, 3, 64, 64)
        masks.square().mean().backward()
        gradients[memory] = {name: p.grad for name, p in model.named_parameters()}
    for name, expected in gradients["plain"].items():
        assert expected is not None, name
        torch.testing.assert_close(gradients["reversible"][name], expected, rtol=1e-6, atol=1e-9, msg=name)
