"""The engine reproduces float64 trajectories of the published research code (see golden/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from petra_zoo.models import PetraPaperRevNet
from petra_zoo.petra import Optimization, Pipeline

GOLDEN = Path(__file__).with_name("golden")
FILES = ("petra_k1", "petra_k2", "dsp_k1", "delayed_k1", "backprop_k1")
UNITS = ["stem", "rev", "rev", "rev", "down", "rev", "rev", "head"]
PREFIXES = ["", "layers.0.0.", "layers.0.1.", "layers.0.2.", "layers.1.0.", "layers.1.1.", "layers.1.2.", ""]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


@pytest.mark.parametrize("name", FILES)
def test_golden_trajectory_is_reproduced(name: str) -> None:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        settings = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    assert json.loads(settings["units"]) == UNITS
    width = int(settings["stream_width"])
    model = PetraPaperRevNet((3, 3), (width, 2 * width), num_classes=10, stem_type="cifar", dtype=torch.float64)
    with torch.no_grad():
        for key, value in tensors.items():
            if key.startswith("init."):
                unit, rest = key.removeprefix("init.unit").split(".", 1)
                model.get_parameter(PREFIXES[int(unit)] + rest).copy_(value)

    def optimizer(named: list[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
        decayed = [p for _, p in named if p.ndim > 1]  # neither batch norm nor biases
        others = [p for _, p in named if p.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": float(settings["weight_decay"])},
            {"params": others, "weight_decay": 0.0},
        ]
        momentum = float(settings["momentum"])
        return torch.optim.SGD(
            [group for group in groups if group["params"]], float(settings["lr"]), momentum, nesterov=True
        )

    pipeline = Pipeline(
        model,
        len(UNITS),
        method=settings["method"],
        optimization=Optimization(optimizer, accumulation_steps=int(settings["accumulation_steps"])),
    )
    for t in range(int(settings["ticks"])):
        loss = pipeline.step(tensors["images"][t], tensors["labels"][t]).loss
        if torch.isnan(tensors["losses"][t]):
            assert loss is None
        else:
            assert loss is not None
            assert relative(loss, tensors["losses"][t]) < 1e-10, f"tick {t}"
    state = model.state_dict()
    worst = 0.0
    for key, value in tensors.items():
        if key.startswith("final."):
            unit, rest = key.removeprefix("final.unit").split(".", 1)
            worst = max(worst, relative(state[PREFIXES[int(unit)] + rest], value))
    assert worst < 1e-10
