"""One process or many: the same bits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from petra_zoo.petra import METHODS, Wire, World
from tests.petra.processes import own_world, run_processes
from tests.petra.strict_channels import ERRORS, strict_channels
from tests.petra.test_pipeline import UNITS, batches, make_model, make_pipeline, sgd

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]


def adamw(named: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for _, p in named], 1e-3, foreach=True)


PLAIN = Wire()
Case = tuple[Any, ...]  # optimizer, layout, the pipeline's options, channels_last, and the wire
OPTIMIZERS = {"sgd": sgd(0.02), "adamw": adamw}


def data(n: int) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches whose last one is smaller."""
    whole = batches(n, dtype=torch.float32)
    return [*whole[:-1], (whole[-1][0][:3], whole[-1][1][:3])]


def train(
    world: World | None,
    optimizer: str,
    layout: Any,
    options: dict[str, Any],
    channels_last: bool,
    wire: Wire = PLAIN,
) -> dict[str, Any]:
    """Trains with dropout and stochastic depth, evaluates with micro-batches in flight, trains on, drains."""
    model = make_model(torch.float32, drop_rate=0.1, drop_path_rate=0.2, coupling=[1.0, 0.5, 0.0, 1.0])
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(memory_format=memory_format)
    world = replace(world or World(), wire=wire)
    pipeline = make_pipeline(model, layout, optimizer=OPTIMIZERS[optimizer], world=world, **options)
    feed = [(x.to(memory_format=memory_format), y) for x, y in data(8)]
    outputs = [pipeline.step(*batch) if pipeline.world.first else pipeline.step() for batch in feed[:5]]
    logits = [x for x, _ in pipeline.predict(feed[:3] if pipeline.world.first else [], 3)]
    outputs += [pipeline.step(*batch) if pipeline.world.first else pipeline.step() for batch in feed[5:]]
    outputs += pipeline.drain()
    pipeline.links.finish()
    whole = pipeline.whole_model()
    return {
        "losses": [output.loss for output in outputs if output.loss is not None],
        "labels": [output.labels for output in outputs if output.labels is not None],
        "logits": logits,
        "state": None if whole is None else whole.state_dict(),
        "parameters": [name for name, p in model.named_parameters() if not p.is_meta],
    }


def train_in_a_rank(cases: list[Case], strict: bool = False) -> list[dict[str, Any]]:
    world = own_world()
    if strict:
        world = replace(world, channels=strict_channels(world), evaluation_channels=strict_channels(world))
    results = [train(world, *case) for case in cases]
    assert ERRORS == []
    return results


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What differs between two runs, in any bit."""
    found = [key for key in ("losses", "labels", "logits") if len(a[key]) != len(b[key]) or not a[key]]
    found += [
        f"{key}[{i}]"
        for key in ("losses", "labels", "logits")
        for i, (x, y) in enumerate(zip(a[key], b[key], strict=False))
        if not torch.equal(x, y)
    ]
    return found + [name for name, x in b["state"].items() if not torch.equal(a["state"][name], x)]


# Launching processes takes longer than training: each number of ranks runs all its cases in one launch.
CASES: dict[int, list[Case]] = {
    2: [
        ("sgd", 2, {"method": "petra"}, False),
        ("sgd", 2, {"method": "local"}, False),
        ("adamw", UNITS, {"method": "petra", "last_stage": "recompute"}, False),
        ("sgd", 3, {"method": "petra", "autocast": torch.bfloat16}, True, Wire(torch.bfloat16, torch.bfloat16)),
    ],
    3: [
        ("sgd", 5, {"method": "petra", "autocast": torch.float16}, False),
        *(("sgd", 5, {"method": m, "accumulation_steps": 2, "clip_grad": 1.0}, False) for m in METHODS),
        *(
            ("sgd", UNITS, {"method": m, "accumulation_steps": 2, "weight_prediction": "backward"}, False)
            for m in ("petra", "dsp", "delayed")
        ),
    ],
    4: [
        *(("sgd", 4, {"method": method}, False) for method in METHODS),
        ("sgd", 5, {"method": "petra"}, False, Wire(torch.bfloat16, torch.bfloat16)),
        ("sgd", 5, {"method": "petra", "autocast": torch.bfloat16}, False),
        ("sgd", 4, {"method": "petra"}, True),
        ("adamw", 4, {"method": "petra", "weight_prediction": "head"}, True),
        ("adamw", 4, {"method": "petra", "accumulation_steps": 3}, False),
        ("sgd", [2, 3, 4, 5], {"method": "delayed"}, False),
        ("sgd", UNITS, {"method": "dsp"}, True),
    ],
}


@pytest.mark.parametrize("strict", [pytest.param(False, id="gloo"), pytest.param(True, id="by NCCL's rules")])
@pytest.mark.parametrize("ranks", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_processes_compute_the_bits_of_one_process(ranks: int, strict: bool, tmp_path: Path) -> None:
    cases = CASES[ranks] if ranks > 2 or not strict else CASES[ranks][:1]
    found = run_processes(ranks, tmp_path, train_in_a_rank, cases, strict)
    for case, by_head in zip(cases, found[-1], strict=True):
        assert differences(by_head, train(None, *case)) == [], case
    everything = {name for name, _ in make_model().named_parameters()}
    for i, case in enumerate(cases):
        kept = [name for results in found for name in results[i]["parameters"]]
        assert sorted(kept) == sorted(everything), f"every rank keeps its own stages only: {case}"
        assert all(results[i]["state"] is None and not results[i]["losses"] for results in found[:-1])
