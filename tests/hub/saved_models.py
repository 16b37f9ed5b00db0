"""Small models saved as a run leaves them."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf

import petra_zoo  # noqa: F401  (registers the models)

DIGITS = {"input_size": (3, 8, 8), "mean": (0.3,) * 3, "std": (0.4,) * 3, "interpolation": "bicubic", "crop_pct": 1.0}


def save(folder: Path, labels: list[str] | None = None, coupling: float = 1.0, **kwargs: Any) -> Any:
    """Saves a tiny reversible network for 8x8 images, with random weights and statistics; gives the model."""
    torch.manual_seed(0)
    kwargs = {"num_classes": 4, "in_chans": 3, **kwargs}
    model: Any = timm.create_model("petra_revnet_tiny", **kwargs)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(32, kwargs["in_chans"], 8, 8))  # running statistics that are not the initial ones
        model.fc.weight.normal_()
    model.set_coupling(coupling)
    config: dict[str, Any] = DIGITS | {"input_size": (kwargs["in_chans"], 8, 8)}
    if kwargs["in_chans"] == 1:
        config |= {"mean": (0.3,), "std": (0.4,)}
    labelled = {"label_names": labels} if labels else None
    save_for_hf(model, str(folder), model_config=labelled, safe_serialization=True, data_config=config)
    return model.eval()
