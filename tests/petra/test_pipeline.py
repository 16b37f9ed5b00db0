"""The engine: its timing, its gradients against exact backpropagation, and what it keeps."""

import copy
from collections import Counter
from dataclasses import fields
from functools import cache, partial
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import petra_zoo  # noqa: F401 - registers the models
from petra_zoo.petra import METHODS, Costs, Layout, Method, Optimization, Output, Pipeline, World, find_method
from petra_zoo.reversible import units_of
from tests.models.networks import with_trained_statistics

SIZE = (3, 8, 8)
UNITS = 14  # of petra_revnet_tiny
PIPELINED = ("petra", "dsp", "delayed")
OPTIMIZATION = {field.name for field in fields(Optimization)}


def make_model(dtype: torch.dtype = torch.float64, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("petra_revnet_tiny", num_classes=10, **kwargs)
    return with_trained_statistics(model).to(dtype).train()


def batches(n: int, size: int = 4, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda: torch.randn(size, *SIZE, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return [(draw(), torch.randint(0, 10, (size,), generator=generator)) for _ in range(n)]


def _sgd(named: Any, lr: float, momentum: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for _, p in named], lr, momentum=momentum)


def sgd(lr: float, momentum: float = 0.9) -> Any:
    return partial(_sgd, lr=lr, momentum=momentum)  # which a process that is started can take


def make_pipeline(
    model: Any, layout: int | list[int], *, method: str = "petra", last_stage: str = "graph", **kwargs: Any
) -> Pipeline:
    """A pipeline for images of `SIZE`; what belongs to its layout and its optimization is told apart from the rest."""
    ranks = kwargs["world"].size if kwargs.get("world") else 1
    chosen = find_method(method).with_last_stage(last_stage)
    optimization = {key: kwargs.pop(key) for key in OPTIMIZATION if key in kwargs}
    counts = ranks > 1 or (isinstance(layout, int) and 1 < layout < len(units_of(model)))  # what decides, no more
    costs = _costs(model, chosen) if counts else None
    return Pipeline(
        model,
        Layout.of(model, layout, method=chosen, ranks=ranks, costs=costs, input_size=SIZE),
        method=chosen,
        optimization=Optimization(**{"optimizer": sgd(0.02), **optimization}),
        **kwargs,
    )


_COUNTED: dict[Any, Costs] = {}


def _costs(model: Any, method: Method) -> Costs:
    """Those that Layout.of would count itself, counted once for all networks of the same weights' shapes."""
    key = (method, *(p.shape for p in model.parameters()))
    if key not in _COUNTED:
        _COUNTED[key] = Costs.counted(model, SIZE, method)
    return _COUNTED[key]


def run(pipeline: Pipeline, data: list[tuple[Tensor, Tensor]], drain: bool = True) -> list[Output]:
    outputs = [pipeline.step(*batch) for batch in data]
    outputs = [output for output in outputs if output.loss is not None]
    return outputs + (pipeline.drain() if drain else [])


def summed_gradients(method: str, stages: int, data: list[tuple[Tensor, Tensor]], **kwargs: Any) -> dict[str, Tensor]:
    """Mean gradient of all micro-batches at fixed parameters, as the optimizer gets it."""
    model = make_model(drop_rate=0.1, drop_path_rate=0.2)
    before = copy.deepcopy(model.state_dict())
    optimizer = sgd(1.0, momentum=0.0)
    pipeline = make_pipeline(model, stages, method=method, accumulation_steps=len(data), optimizer=optimizer, **kwargs)
    run(pipeline, data)
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}


@cache
def _by_backpropagation() -> dict[str, Tensor]:
    return summed_gradients("backprop", 1, batches(6))


@pytest.mark.parametrize("last_stage", ["graph", "recompute"])
@pytest.mark.parametrize("stages", [1, 2, 5, UNITS])
@pytest.mark.parametrize("method", [method for method in METHODS if method != "local"])
def test_at_fixed_parameters_the_gradient_is_backpropagations(method: str, stages: int, last_stage: str) -> None:
    """Dropout and stochastic depth included: random numbers belong to (unit, micro-batch)."""
    found = summed_gradients(method, stages, batches(6), last_stage=last_stage)
    for name, gradient in _by_backpropagation().items():
        assert float((found[name] - gradient).norm()) < 1e-9 * float(gradient.norm()) + 1e-12, name


def test_the_exact_control_is_plain_training_to_the_bit() -> None:
    model, plain = make_model(), make_model()
    data = batches(4)
    run(make_pipeline(model, 1, method="backprop"), data)
    optimizer = torch.optim.SGD(plain.parameters(), 0.02, momentum=0.9)
    plain.set_memory("plain")
    for images, labels in data:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(plain(images), labels).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_one_stage_has_no_delay(method: str) -> None:
    model, control = make_model(), make_model()
    data = batches(5)
    run(make_pipeline(model, 1, method=method), data)
    run(make_pipeline(control, 1, method="backprop"), data)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), control.parameters(), strict=True))


@pytest.mark.slow
def test_the_methods_differ_once_parameters_move() -> None:
    finals = {}
    for method in METHODS:
        model = make_model()
        run(make_pipeline(model, UNITS, method=method), batches(30))
        finals[method] = nn.utils.parameters_to_vector(model.parameters()).detach()
    different = {frozenset((a, b)) for a in PIPELINED for b in (*PIPELINED, "backprop") if a != b}
    for a, b in (sorted(pair) for pair in different):
        assert float((finals[a] - finals[b]).norm()) > 1e-4 * float(finals[a].norm()), f"{a} and {b}"
    gap = float((finals["reversible"] - finals["backprop"]).norm() / finals["backprop"].norm())
    assert gap < 0.02, "rounding, grown by 30 steps, and nothing else"


@pytest.mark.parametrize("stages", [1, 3, UNITS])
def test_the_first_loss_appears_when_a_micro_batch_reaches_the_head(stages: int) -> None:
    pipeline = make_pipeline(make_model(), stages)
    outputs = [pipeline.step(*batch) for batch in batches(stages + 2)]
    assert [output.micro_batch for output in outputs] == [*([None] * (stages - 1)), 0, 1, 2]
    assert [output.loss is None for output in outputs] == [*([True] * (stages - 1)), False, False, False]


@pytest.mark.parametrize("stages", [1, 2, 5])
def test_backward_at_stage_i_comes_2_times_j_minus_1_minus_i_ticks_after_the_feed(stages: int) -> None:
    pipeline = make_pipeline(make_model(), stages)
    seen = []
    for j, stage in enumerate(pipeline.stages):
        finish = stage._finish_backward

        def record(micro_batch: int, *args: Any, j: int = j, finish: Any = finish) -> Any:
            seen.append((j, micro_batch, pipeline.clock.tick))
            return finish(micro_batch, *args)

        stage._finish_backward = record  # type: ignore[method-assign]
    run(pipeline, batches(7))
    assert len(seen) == 7 * stages
    assert all(tick == n + 2 * (stages - 1) - j for j, n, tick in seen)


def test_fifos_of_units_without_an_inverse_hold_2_times_j_minus_1_minus_i() -> None:
    pipeline = make_pipeline(make_model(), UNITS)
    run(pipeline, batches(40), drain=False)
    for j, stage in enumerate(pipeline.stages[:-1]):
        expected = 0 if stage.units[0].reversible else 2 * (UNITS - 1 - j)
        assert [len(fifo) for fifo in stage.fifos] == [expected], stage.units[0].name


def test_f_is_evaluated_twice_in_a_reversible_stage_and_once_in_the_last() -> None:
    model = make_model()
    pipeline = make_pipeline(model, [4, 5, 5])
    counts: Counter[str] = Counter()
    for name, block in model.named_modules():
        if name.endswith("conv1"):
            block.register_forward_hook(lambda *args, name=name: counts.update([name]))
    n = 5
    run(pipeline, batches(n))
    last = {unit.name for unit in pipeline.stages[-1].units}
    for unit in model.units()[:-1]:
        name = "conv1" if unit.name == "stem" else f"{unit.name}.conv1"
        assert counts[name] == (n if unit.name in last else 2 * n), name


@pytest.mark.parametrize("method", ["delayed", "backprop"])
def test_f_is_evaluated_once_where_the_graph_is_kept(method: str) -> None:
    model = make_model()
    counts: Counter[str] = Counter()
    model.layer1[1].conv1.register_forward_hook(lambda *args: counts.update(["F"]))
    run(make_pipeline(model, 5, method=method), batches(4))
    assert counts["F"] == 4


@pytest.mark.parametrize("method", METHODS)
def test_statistics_are_updated_once_per_micro_batch(method: str) -> None:
    model = make_model()
    run(make_pipeline(model, 5, method=method), batches(6))
    tracked = [int(b) for name, b in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert set(tracked) == {6}


def test_reconstruction_with_changed_parameters_is_approximate_but_close() -> None:
    """A run of three reversible units in stages of their own: the second's input is reconstructed by the third."""
    errors = {}
    for lr in (1e-4, 1e-3):
        pipeline = make_pipeline(make_model(), UNITS, optimizer=sgd(lr))
        with pipeline.probe() as probe:
            run(pipeline, batches(8))
        of_stage = [m.reconstruction_error for m in probe.measurements if m.stage == 2]
        assert of_stage[0] == pytest.approx(0.0, abs=1e-12)  # nothing was updated yet
        errors[lr] = torch.tensor(of_stage[1:])
        assert bool((errors[lr] > 1e-6).all())
    assert bool((errors[1e-4] < 0.05).all())
    assert float(errors[1e-4].mean()) < float(errors[1e-3].mean())


def test_a_probe_finds_exact_gradients_at_fixed_parameters() -> None:
    pipeline = make_pipeline(make_model(), 5, optimizer=sgd(0.0))
    with pipeline.probe() as probe:
        run(pipeline, batches(4))
    assert len(probe.measurements) == 4 * 5
    for m in probe.measurements:
        assert m.cosine == pytest.approx(1.0, abs=1e-9)
        assert m.norm_ratio == pytest.approx(1.0, abs=1e-9)
        assert m.reconstruction_error is None or m.reconstruction_error < 1e-12


def test_a_probe_sees_the_delay_grow_towards_the_first_stage() -> None:
    pipeline = make_pipeline(make_model(), UNITS, optimizer=sgd(0.01))
    with pipeline.probe(every=3) as probe:
        run(pipeline, batches(36))
    mean = [
        torch.tensor([m.cosine for m in probe.measurements if m.stage == j and m.micro_batch > 20]).mean()
        for j in (0, UNITS - 1)
    ]
    assert mean[0] < mean[1] - 0.01  # against backpropagation with the parameters of the backward's tick


def test_a_probe_changes_nothing_and_leaves_nothing_behind() -> None:
    model, other = make_model(), make_model()
    pipeline, control = make_pipeline(model, 5), make_pipeline(other, 5)
    data = batches(8)
    with pipeline.probe():
        run(pipeline, data[:4], drain=False)
    run(pipeline, data[4:])
    run(control, data)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert all(stage.watcher is None for stage in pipeline.stages)


@pytest.mark.parametrize("method", METHODS)
def test_a_restored_pipeline_continues_to_the_bit(method: str) -> None:
    data = batches(16)
    settings = {"method": method, "accumulation_steps": 3, "scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 2)}
    model = make_model(drop_rate=0.1, drop_path_rate=0.2)
    pipeline = make_pipeline(model, 5, **settings)
    run(pipeline, data[:7], drain=False)
    state = copy.deepcopy(pipeline.state_dict())
    expected = run(pipeline, data[7:])

    again = make_model(drop_rate=0.1, drop_path_rate=0.2)
    restored = make_pipeline(again, 5, **settings)
    restored.load_state_dict(state)
    found = run(restored, data[7:])
    assert [o.micro_batch for o in found] == [o.micro_batch for o in expected]
    assert all(torch.equal(a.loss, b.loss) for a, b in zip(found, expected, strict=True))
    pairs = zip(again.state_dict().values(), model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_state_of_another_partition_is_refused() -> None:
    state = make_pipeline(make_model(), 5).state_dict()
    with pytest.raises(ValueError, match="partition"):
        make_pipeline(make_model(), 4).load_state_dict(state)


@pytest.mark.parametrize("method", METHODS)
def test_drain_returns_what_was_in_flight_and_uses_every_gradient(method: str) -> None:
    pipeline = make_pipeline(make_model(), 5, method=method, accumulation_steps=4)
    outputs = run(pipeline, batches(6))
    assert [output.micro_batch for output in outputs] == list(range(6))
    assert pipeline.in_flight == 0
    assert all(stage.gradients_in_window == 0 for stage in pipeline.stages)
    assert all(p.grad is None for p in pipeline.model.parameters())


def test_a_partial_window_is_averaged_over_its_own_count() -> None:
    model, control = make_model(), make_model()
    run(make_pipeline(model, 1, method="backprop", accumulation_steps=4), batches(2))
    run(make_pipeline(control, 1, method="backprop", accumulation_steps=2), batches(2))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), control.parameters(), strict=True))


def test_an_uneven_last_micro_batch_is_no_error() -> None:
    pipeline = make_pipeline(make_model(), 5)
    images, labels = batches(1)[0]
    run(pipeline, [*batches(4), (images[:3], labels[:3]), *batches(2)])


def test_evaluation_leaves_messages_statistics_and_modes_alone() -> None:
    data = batches(8)
    model, control = make_model(), make_model()
    pipeline, undisturbed = make_pipeline(model, 5), make_pipeline(control, 5)
    model.layer1[0].bn1.eval(), control.layer1[0].bn1.eval()
    for batch in data:
        pipeline.step(*batch)
        ((logits, labels),) = pipeline.predict(data[:1])
        assert logits.shape == (4, 10)
        assert torch.equal(labels, data[0][1])
        undisturbed.step(*batch)
    pairs = zip(model.state_dict().values(), control.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert model.training
    assert not model.layer1[0].bn1.training
    assert torch.equal(logits, model.eval()(data[0][0]))


def test_all_stages_change_their_learning_rate_in_the_same_tick() -> None:
    scheduler = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)  # noqa: E731
    pipeline = make_pipeline(make_model(), 5, accumulation_steps=2, optimizer=sgd(1.0), scheduler=scheduler)
    rates = []
    for batch in batches(6):
        pipeline.step(*batch)
        rates.append({stage.optimizer.param_groups[0]["lr"] for stage in pipeline.stages})  # type: ignore[union-attr]
    assert rates == [{1.0}, {0.5}, {0.5}, {0.25}, {0.25}, {0.125}]


def test_gradients_are_clipped_per_stage() -> None:
    data = batches(1)
    model = make_model()
    before = [p.detach().clone() for p in model.parameters()]
    pipeline = make_pipeline(model, 3, method="backprop", optimizer=sgd(1.0, 0.0), clip_grad=1e-3)
    stage_of = {id(p): j for j, stage in enumerate(pipeline.stages) for group in stage.parameters for p in group}
    run(pipeline, data)
    squares = [0.0] * 3
    for p, old in zip(model.parameters(), before, strict=True):
        squares[stage_of[id(p)]] += float((p.detach() - old).square().sum())
    assert [square**0.5 for square in squares] == pytest.approx([1e-3] * 3, rel=1e-3)


def test_soft_labels_travel_with_their_micro_batch() -> None:
    hard, soft = make_model(), make_model()
    data = batches(6)
    run(make_pipeline(hard, 5), data)
    run(make_pipeline(soft, 5), [(x, torch.nn.functional.one_hot(y, 10).double()) for x, y in data])
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(hard.parameters(), soft.parameters(), strict=True))


@pytest.mark.parametrize("opt", ["adamw", "lion", "lamb", "rmsprop"])
def test_any_timm_optimizer_drives_a_stage(opt: str) -> None:
    model = make_model()
    before = [p.detach().clone() for p in model.parameters()]
    factory = lambda named: create_optimizer_v2([p for _, p in named], opt=opt, lr=1e-3)  # noqa: E731
    run(make_pipeline(model, 5, optimizer=factory), batches(4))
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert all(moved)


def test_the_optimizer_gets_names_of_the_full_model() -> None:
    names = []
    model = make_model()

    def factory(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        names.extend(name for name, _ in named)
        return torch.optim.SGD([p for _, p in named], 0.1)

    make_pipeline(model, 5, optimizer=factory)
    assert names == [name for name, _ in model.named_parameters()]


def test_frozen_stages_need_no_optimizer() -> None:
    model = make_model()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("fc"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run(make_pipeline(model, 5), batches(4))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(("streams", "dtype"), [("float32", torch.float32), ("auto", torch.bfloat16)])
def test_bfloat16_autocast_trains_with_messages_in_the_streams_type(streams: str, dtype: torch.dtype) -> None:
    model = make_model(torch.float32)
    model.set_streams(streams)
    pipeline = make_pipeline(model, 5, autocast=torch.bfloat16)
    outputs = run(pipeline, batches(6, dtype=torch.float32), drain=False)
    assert all(x.dtype == dtype for queue in pipeline.links.ups.values() for up in queue for x in up.streams)
    kept = [x for stage in pipeline.stages for fifo in stage.fifos[1:] for streams in fifo for x in streams]
    assert all(x.dtype == dtype for x in kept)
    assert all(torch.isfinite(o.loss) for o in outputs)


def test_training_leaves_the_global_generator_alone() -> None:
    pipeline = make_pipeline(make_model(drop_rate=0.5), 5)
    before = torch.get_rng_state()
    run(pipeline, batches(4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"layout": UNITS + 1}, "stages=15 does not fit a model of 14 units: choose 1 to 14"),
        ({"layout": 0}, "choose 1 to 14"),
        ({"layout": [7, 6]}, "add up to the model's 14 units, not 13"),
        ({"layout": [14, 0]}, "must be positive"),
        ({"layout": 2, "method": "dps"}, "unknown method 'dps'; did you mean dsp"),
        ({"layout": 2, "accumulation_steps": 0}, "at least 1"),
        ({"layout": 2, "last_stage": "keep"}, "'graph' or 'recompute'"),
    ],
)
def test_bad_settings_say_what_would_do(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_pipeline(make_model(), **kwargs)


def test_a_probe_is_refused_where_stages_are_spread_over_processes() -> None:
    pipeline = make_pipeline(make_model(), 2, world=World(rank=0, size=2, peers=(0, 1)))
    with pytest.raises(RuntimeError, match=r"probe\(\) is for a pipeline in one process"), pipeline.probe():
        pass


def test_a_parameter_that_no_unit_has_is_refused_by_name() -> None:
    model = make_model()
    model.temperature = torch.nn.Parameter(torch.ones(()))  # of a head that somebody extended
    with pytest.raises(ValueError, match="temperature belongs to no unit"):
        Pipeline(model, 2)
