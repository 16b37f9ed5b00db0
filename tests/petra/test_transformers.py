"""The engine on a reversible vision transformer, whose body is one run: only images wait in a FIFO."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from petra_zoo.models import PetraRevViT
from petra_zoo.petra import Layout, Optimization, Pipeline, World
from petra_zoo.petra.rates import rates_of
from tests.models.test_petra_revvit import DROPS, small
from tests.models.transformers import transformer
from tests.petra.fake_graph import FakeGraph
from tests.petra.processes import own_world, run_processes
from tests.petra.test_captured import assert_same, cosine, replayed
from tests.petra.test_pipeline import SIZE, batches, make_pipeline, run, sgd
from tests.petra.test_processes import adamw, differences

UNITS = 8  # patch embedding, attention and MLP of three blocks, head
Batch = tuple[Tensor, Tensor]


def slow(value: str) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


def make_model(dtype: torch.dtype = torch.float64, **kwargs: Any) -> PetraRevViT:
    return small(dtype, num_classes=10, **kwargs).train()


def summed_gradients(method: str, stages: int, data: list[Batch], **kwargs: Any) -> dict[str, Tensor]:
    """Mean gradient of all micro-batches at fixed parameters, as the optimizer gets it."""
    model = make_model(**DROPS, **kwargs)
    before = copy.deepcopy(model.state_dict())
    settings: dict[str, Any] = {"accumulation_steps": len(data), "optimizer": sgd(1.0, momentum=0.0)}
    run(make_pipeline(model, stages, method=method, **settings), data)
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) < 1e-9 * float(gradient.norm()) + 1e-12, name


@pytest.mark.parametrize("stages", [pytest.param(2, marks=pytest.mark.slow), UNITS])
@pytest.mark.parametrize("method", ["petra", "dsp", *(slow(name) for name in ("delayed", "reversible"))])
def test_at_fixed_parameters_the_gradient_is_backpropagations(method: str, stages: int) -> None:
    """Dropout, attention's dropout and stochastic depth included."""
    data = batches(4)
    assert_close(summed_gradients(method, stages, data), summed_gradients("backprop", 1, data))


def test_branches_in_parts_train_in_a_pipeline() -> None:
    data = batches(4)
    expected = summed_gradients("backprop", 1, data, chunks=2)
    assert_close(summed_gradients("petra", UNITS, data, chunks=2), expected)


@pytest.mark.parametrize("kind", ["vit", "layer scale", slow("eva02"), slow("beit")])
def test_attention_and_mlp_of_a_block_train_in_two_stages(kind: str) -> None:
    def trained(method: str, stages: int) -> dict[str, Tensor]:
        model = transformer(kind, depth=2, num_classes=10, coupling=1.0, units="branch").double().train()
        before = copy.deepcopy(model.state_dict())
        run(make_pipeline(model, stages, method=method, **settings), data)
        return {name: before[name] - p.detach() for name, p in model.named_parameters()}

    data = [(torch.randn(2, 3, 16, 16, dtype=torch.float64), y[:2]) for _, y in batches(2)]
    settings: dict[str, Any] = {"accumulation_steps": 2, "optimizer": sgd(1.0, momentum=0.0)}
    assert_close(trained("petra", 6), trained("backprop", 1))


def test_nothing_but_images_waits() -> None:
    pipeline = make_pipeline(make_model(), UNITS)
    run(pipeline, batches(18), drain=False)
    kept = [[len(fifo) for fifo in stage.fifos] for stage in pipeline.stages[:-1]]
    assert kept == [[2 * (UNITS - 1)], *([[0]] * (UNITS - 2))]


def test_a_probe_finds_exact_gradients_at_fixed_parameters() -> None:
    pipeline = make_pipeline(make_model(), 4, optimizer=sgd(0.0))
    with pipeline.probe() as probe:
        run(pipeline, batches(3))
    assert len(probe.measurements) == 3 * 4
    for m in probe.measurements:
        assert m.cosine == pytest.approx(1.0, abs=1e-9)
        assert m.norm_ratio == pytest.approx(1.0, abs=1e-9)
        assert m.reconstruction_error is None or m.reconstruction_error < 1e-12


def test_reconstruction_with_changed_parameters_is_approximate_but_close() -> None:
    pipeline = make_pipeline(make_model(), UNITS, optimizer=sgd(1e-3))
    with pipeline.probe() as probe:
        run(pipeline, batches(8))
    errors = torch.tensor([m.reconstruction_error for m in probe.measurements if m.stage == 2])
    assert float(errors[0]) == pytest.approx(0.0, abs=1e-12)  # nothing was updated yet
    assert bool(((errors[1:] > 1e-7) & (errors[1:] < 0.05)).all())


@pytest.mark.parametrize("prediction", [slow("none"), "head", slow("backward")])
def test_a_restored_pipeline_continues_to_the_bit(prediction: str) -> None:
    data = batches(14)
    settings: dict[str, Any] = {"accumulation_steps": 3, "optimizer": adamw, "clip_grad": 1.0}
    settings |= {"weight_prediction": prediction}
    model, again = make_model(**DROPS), make_model(**DROPS)
    pipeline = make_pipeline(model, 5, **settings)
    run(pipeline, data[:6], drain=False)
    state = copy.deepcopy(pipeline.state_dict())
    expected = run(pipeline, data[6:])
    restored = make_pipeline(again, 5, **settings)
    restored.load_state_dict(state)
    found = run(restored, data[6:])
    assert all(torch.equal(a.loss, b.loss) for a, b in zip(found, expected, strict=True))
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))


# -- one process or many ------------------------------------------------------------------------------------------

CASES: tuple[tuple[int | list[int], dict[str, Any]], ...] = (
    (UNITS, {"method": "petra", "accumulation_steps": 2, "weight_prediction": "head"}),
    ([2, 1, 2, 3], {"method": "petra", "autocast": torch.bfloat16}),  # cut between attention and MLP
    (4, {"method": "dsp", "last_stage": "recompute"}),
    (4, {"method": "delayed", "clip_grad": 1.0}),
    (4, {"method": "reversible"}),
)


def train(world: World | None, layout: int | list[int], options: dict[str, Any]) -> dict[str, Any]:
    model = make_model(torch.float32, **DROPS)
    pipeline = make_pipeline(model, layout, optimizer=adamw, world=world or World(), **options)
    feed = batches(9, dtype=torch.float32)
    outputs = [pipeline.step(*batch) if pipeline.world.first else pipeline.step() for batch in feed]
    logits = [x for x, _ in pipeline.predict(feed[:2] if pipeline.world.first else [], 2)]
    outputs += pipeline.drain()
    pipeline.links.finish()
    whole = pipeline.whole_model()
    return {
        "losses": [output.loss for output in outputs if output.loss is not None],
        "labels": [output.labels for output in outputs if output.labels is not None],
        "logits": logits,
        "state": None if whole is None else whole.state_dict(),
    }


def train_in_a_rank(cases: Any) -> list[dict[str, Any]]:
    world = own_world()
    return [train(world, *case) for case in cases]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_compute_the_bits_of_one_process(ranks: int, tmp_path: Path) -> None:
    cases = CASES[:2] if ranks == 2 else CASES
    found = run_processes(ranks, tmp_path, train_in_a_rank, cases)
    for case, by_head in zip(cases, found[-1], strict=True):
        assert differences(by_head, train(None, *case)) == [], case


# -- mixed precision, captured ticks ------------------------------------------------------------------------------


def test_under_autocast_streams_are_half_as_wide_and_one_stage_is_backpropagation() -> None:
    data, states = batches(4, dtype=torch.float32), []
    for method in ("petra", "backprop"):
        model = make_model(torch.float32)
        run(make_pipeline(model, 1, method=method, autocast=torch.bfloat16), data)
        states.append(model.state_dict())
    assert all(map(torch.equal, states[0].values(), states[1].values()))
    with torch.autocast("cpu", torch.bfloat16):
        assert {x.dtype for x in model.units()[0](data[0][0])} == {torch.bfloat16}


def captured(method: str, graphs: Any) -> Pipeline:
    model = make_model(torch.float32, **DROPS)
    pipeline = Pipeline(
        model,
        Layout.of(model, 3, method=method, input_size=SIZE),
        method=method,
        optimization=Optimization(sgd(0.1), scheduler=cosine, clip_grad=1.0, accumulation_steps=2),
        loss=F.cross_entropy,
        graphs=graphs,
    )
    for stage in pipeline.stages:  # on the device, as on a GPU
        if stage.optimizer and not stage.rates:
            stage.rates = rates_of(stage.optimizer, torch.device("cpu"), prepare=stage.prediction is None)
    return pipeline


@pytest.mark.parametrize("method", ["petra", slow("reversible")])
def test_captured_ticks_compute_the_same_bits(method: str) -> None:
    ours, plain = captured(method, FakeGraph), captured(method, "off")
    assert_same(ours, plain, [batches(14, dtype=torch.float32)])
    assert replayed(ours) > 2


def test_it_learns() -> None:
    """Four stages, three updates late: the loss of one repeated batch falls."""
    model = make_model(torch.float32)
    batch = batches(1, size=8, dtype=torch.float32)[0]
    pipeline = make_pipeline(model, 4, accumulation_steps=2, optimizer=adamw)
    losses = [float(output.loss) for output in run(pipeline, [batch] * 60) if output.loss is not None]
    assert losses[-1] < 0.5 * losses[0]
