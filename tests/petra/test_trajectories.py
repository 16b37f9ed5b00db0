"""Trajectories of this engine, committed: what training computed once, it computes still.

`trajectories.json` holds losses and parameter norms of short float64 runs that the golden files do not cover: stages of
several units, reversible ResNets with several couplings, dropout, stochastic depth, accumulation, draining.
The learning rate is small because another processor rounds otherwise: at 0.005 a change of the images by 1e-12 moves a
loss by 1e-6, at this one by less than the tolerance.
Written by ``python -m tests.petra.test_trajectories``; a change of it needs a reason in the commit message.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from petra_zoo.petra import METHODS
from tests.petra.test_pipeline import batches, make_model, make_pipeline, run, sgd

FILE = Path(__file__).with_name("trajectories.json")
CASES = [(method, stages, k) for method in METHODS for stages, k in ((3, 1), (7, 2))]


def trajectory(method: str, stages: int, k: int) -> dict[str, Any]:
    model = make_model(drop_rate=0.1, drop_path_rate=0.2, coupling=[1.0, 0.5, 1.0, 0.25])
    pipeline = make_pipeline(model, stages, method=method, accumulation_steps=k, optimizer=sgd(0.0003))
    outputs = run(pipeline, batches(12))
    numbers = {name: value for name, value in model.state_dict().items() if not name.endswith("exponent")}  # a setting
    state = {name: float(value.double().norm()) for name, value in numbers.items()}
    return {"losses": [float(output.loss) for output in outputs if output.loss is not None], "norms": state}


@pytest.mark.parametrize(("method", "stages", "k"), CASES)
def test_trajectory_is_unchanged(method: str, stages: int, k: int) -> None:
    expected = json.loads(FILE.read_text())[f"{method}-{stages}-{k}"]
    found = trajectory(method, stages, k)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-8)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-8)


if __name__ == "__main__":
    FILE.write_text(json.dumps({f"{m}-{j}-{k}": trajectory(m, j, k) for m, j, k in CASES}, indent=1) + "\n")
