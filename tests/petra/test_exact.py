"""Exact inversion below coupling 1 under the engine: where parameters stay it holds, elsewhere it is refused."""

import pytest
import torch
from torch import nn

from petra_zoo.errors import UserError
from petra_zoo.petra import NotFiniteError
from petra_zoo.reversible.saturation import NotRecomputedError
from tests.petra.test_pipeline import batches, make_model, make_pipeline, run

DATA = batches(3, dtype=torch.float32)


def exact(g: float) -> nn.Module:
    return make_model(torch.float32, exact=True, coupling=g, drop_path_rate=0.2)


@pytest.mark.parametrize("streams", [{"exact": True}, {"streams": "fixed16"}])
def test_petra_refuses_what_rests_on_parameters_that_stay(streams: dict[str, object]) -> None:
    model = make_model(torch.float32, coupling=0.25, **streams)
    with pytest.raises(UserError, match=r"layer1\.1 .* under petra they do: use coupling 1, or anchors"):
        make_pipeline(model, 4)


@pytest.mark.parametrize("method", ["dsp", "delayed", "reversible"])
def test_methods_that_reconstruct_nothing_or_at_once_take_it(method: str) -> None:
    outputs = run(make_pipeline(exact(0.25), 3, method=method), DATA)
    assert all(output.loss.isfinite() for output in outputs)


def test_reversible_training_has_backpropagations_losses() -> None:
    def losses(method: str) -> list[float]:
        return [float(output.loss) for output in run(make_pipeline(exact(0.25), 2, method=method), DATA)]

    assert losses("reversible") == pytest.approx(losses("backprop"), rel=1e-5)


def test_petra_compares_nothing_at_coupling_1() -> None:
    """Its parameters change between a forward and its backward: what is recomputed is meant to differ."""
    pipeline = make_pipeline(exact(1.0), 4)
    run(pipeline, DATA + DATA)
    assert not any(stage.residues[i] for stage in pipeline.stages for i in range(len(stage.units)))


@pytest.mark.parametrize("deferred", [False, True])
def test_a_branch_that_is_not_recomputed_stops_training(deferred: bool) -> None:
    model = exact(0.5)
    pipeline = make_pipeline(model, 2, method="reversible", last_stage="recompute")
    pipeline.settings.finite.deferred = deferred
    calls = []

    def drift(block: nn.Module, inputs: object, f: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return f + 0.01 * len(calls)

    model.layer2[2].bn2.register_forward_hook(drift)
    with pytest.raises(NotFiniteError if deferred else NotRecomputedError, match=r"the branch of layer2\.2"):
        run(pipeline, DATA)
