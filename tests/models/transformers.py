"""Small reversible transformers for tests, one of each kind, and timm's networks of the same parameters."""

from typing import Any

import timm
import torch
from torch import nn

import petra_zoo  # noqa: F401  (importing it registers our models)

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {}),
    "registers": ("test_vit2", {}),
    "attention pool": ("test_vit3", {}),
    "hybrid": ("vit_tiny_r_s16_p8_224", {"img_size": 32, "patch_size": 2}),
    "parallel": ("vit_small_patch16_18x2_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "layer scale": ("deit3_small_patch16_224", {}),
    "eva02": ("eva02_tiny_patch14_224", {}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "mixed rope": ("vit_small_patch16_rope_mixed_224", {}),
    "beit": ("beit_base_patch16_224", {}),
    "shared bias": ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
}


def transformer(kind: str = "vit", **arguments: Any) -> Any:
    """A reversible one with weights that are no longer initial ones: layer scales and biases count."""
    torch.manual_seed(0)
    return _filled(timm.create_model(f"petra_{KINDS[kind][0]}", **{**SIZES, **KINDS[kind][1], **arguments}))


def source(kind: str = "vit", **arguments: Any) -> Any:
    """timm's, with the same weights."""
    torch.manual_seed(0)
    return _filled(timm.create_model(KINDS[kind][0], **{**SIZES, **KINDS[kind][1], **arguments}))


def images(kind: str = "vit", batch: int = 2) -> torch.Tensor:
    """A batch for one of them."""
    size = KINDS[kind][1].get("img_size", SIZES["img_size"])
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def _filled(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if not name.startswith("rope."):
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model
