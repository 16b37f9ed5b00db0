"""How well are the weights n updates ahead predicted: by the last step, n times, or by what momentum still moves?

    python benchmarks/coasting/run.py             # 4 optimizers, about a minute of one core each
    python benchmarks/coasting/run.py --table     # README.md from results.json

Trains by PETRA as ever, with no prediction, and compares the first stage's weights with those of n updates later.
Errors are relative to predicting that nothing moves; the factor is that of the last step (of lr * v for SGD) which
would have fitted best.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from petra_zoo.machine import processor
from petra_zoo.petra import World
from petra_zoo.petra.coasting import Coasting, CoastingByStep, coasting_of
from petra_zoo.settings.recipe_files import load_recipe
from petra_zoo.training.preparation import prepare

RESULTS, README = (Path(__file__).with_name(name) for name in ("results.json", "README.md"))
SETTINGS = ["img_size=16", "stages=4", "epochs=6", "warmup_epochs=1", "workers=0", "batch_size=64"]
OPTIMIZERS = {"sgd": 0.1, "adamw": 0.002, "nadamw": 0.002, "muon": 0.02}  # and their learning rates
AHEAD = (1, 2, 3, 6, 13)
FIRST, EVERY = 30, 3  # of the updates that are looked at


def measure(opt: str) -> dict[str, Any]:
    """Of one training: settings, and a row for each number of updates."""
    settings = [*SETTINGS, f"opt={opt}", f"lr={OPTIMIZERS[opt]}"]
    prepared = prepare(load_recipe("shapes/petra_revnet_tiny", settings), name="coasting", world=World())
    stage = prepared.pipeline.stages[0]
    assert stage.optimizer is not None
    coasting, step = coasting_of(stage.optimizer), CoastingByStep(stage.optimizer)
    for known in {id(x): x for x in (coasting, step)}.values():
        stage.optimizer.register_step_pre_hook(lambda *_, known=known: known.before_step())
    weights: list[Tensor] = []
    predicted: dict[int, dict[int, Tensor]] = {}
    lasts: dict[int, Tensor] = {}

    def where(known: Coasting, updates: int) -> Tensor:
        with torch.no_grad():
            ahead = {id(p): x for p, x in known.ahead(updates)}
        return flat([ahead.get(id(p), p) for p in stage.own_parameters()])

    for epoch in range(prepared.recipe.epochs):
        prepared.train_loader.set_epoch(epoch)
        for images, labels in prepared.train_loader:
            now = len(weights)
            weights.append(flat(stage.own_parameters()))
            if now >= FIRST and now % EVERY == 0:
                predicted[now] = {n: where(coasting, n) for n in AHEAD}
                lasts[now] = weights[now] - weights[now - 1]
            prepared.pipeline.step(images, labels)
    rows = []
    for n in AHEAD:
        seen = [t for t in predicted if t + n < len(weights)]
        moved = torch.stack([weights[t + n] - weights[t] for t in seen])
        last = torch.stack([lasts[t] for t in seen])
        coasted = torch.stack([predicted[t][n] - weights[t] for t in seen])
        rows.append(
            {
                "updates": n,
                "repeated": float((n * last - moved).norm() / moved.norm()),
                "coasted": float((coasted - moved).norm() / moved.norm()),
                "factor": float((moved * last).sum() / last.square().sum()),
                "factor_of_coasting": float((coasted * last).sum() / last.square().sum()),
            }
        )
    return {"command": " ".join(["petra-zoo train shapes/petra_revnet_tiny", *settings]), "rows": rows}


def flat(tensors: list[Any]) -> Tensor:
    return torch.cat([x.detach().double().flatten() for x in tensors])


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| optimizer | updates | error, last step repeated | error, coasting | best factor | factor of coasting |",
        "|---|---|---|---|---|---|",
    ]
    for opt, run in found.items():
        for row in run["rows"]:
            numbers = [f"{row[name]:.2f}" for name in ("repeated", "coasted", "factor", "factor_of_coasting")]
            lines.append(f"| {opt} | {row['updates']} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write README.md from results.json")
    if not parser.parse_args().table:
        torch.set_num_threads(1)
        results = {
            "machine": f"{processor()}, {os.cpu_count()} cores, one thread",
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
            "command": "python benchmarks/coasting/run.py",
            "found": {opt: measure(opt) for opt in OPTIMIZERS},
        }
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    head, _, rest = README.read_text().partition("<!-- rows -->\n")
    tail = rest.partition("<!-- end of rows -->\n")[2]
    shown = table(json.loads(RESULTS.read_text())["found"])
    README.write_text(f"{head}<!-- rows -->\n{shown}\n<!-- end of rows -->\n{tail}")


if __name__ == "__main__":
    main()
