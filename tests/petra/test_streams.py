"""Streams in 16 bits under the engine: messages keep their bits, and the range of a grid is watched."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from petra_zoo.errors import UserError
from petra_zoo.models.petra_revnet import PetraRevNet
from petra_zoo.petra import GraphedStep, NotFiniteError, Wire, World
from petra_zoo.reversible.saturation import saturations_in
from tests.petra.fake_graph import FakeGraph
from tests.petra.test_pipeline import batches, make_model, make_pipeline, run

BFLOAT16 = torch.bfloat16


def on_a_grid() -> PetraRevNet:
    model = make_model(torch.float32)
    model.set_streams("fixed16")
    return model


def losses(wire: Wire, method: str = "petra") -> list[float]:
    pipeline = make_pipeline(
        on_a_grid(),
        4,
        method=method,
        autocast=BFLOAT16,
        world=World(device=torch.device("cpu"), wire=wire),
    )
    return [float(output.loss) for output in run(pipeline, batches(5, dtype=torch.float32))]


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_a_wire_type_leaves_streams_in_16_bits_alone(dtype: torch.dtype) -> None:
    assert losses(Wire(up=dtype, down=dtype)) == losses(Wire())


def test_local_learning_reads_streams_as_numbers() -> None:
    found, as_numbers = losses(Wire(), method="local"), []
    model = make_model(torch.float32)
    model.set_streams("bfloat16")
    pipeline = make_pipeline(model, 4, method="local", autocast=BFLOAT16)
    as_numbers = [float(output.loss) for output in run(pipeline, batches(5, dtype=torch.float32))]
    assert found[:3] == pytest.approx(as_numbers[:3], rel=0.1)  # behind a few updates the paths part


@pytest.mark.parametrize("deferred", [False, True])
def test_a_stream_beyond_its_grid_stops_training(deferred: bool) -> None:
    model = on_a_grid()
    pipeline = make_pipeline(model, 4, autocast=BFLOAT16)
    pipeline.settings.finite.deferred = deferred
    model.layer3.set_exponent(14)
    with pytest.raises(NotFiniteError if deferred else UserError, match=r"range|needs"):
        run(pipeline, batches(8, dtype=torch.float32))


def test_stages_that_share_a_run_note_its_range_by_themselves() -> None:
    """Side by side on a GPU they write at the same time."""
    model = on_a_grid()
    pipeline = make_pipeline(model, len(model.units()), autocast=BFLOAT16)
    pipeline.settings.finite.deferred = True
    model.get_parameter("layer1.2.bn2.weight").data.fill_(1e4)
    with pytest.raises(NotFiniteError, match=r"a stream of stage 3 "):  # the stem is stage 0, layer1.0 the next
        run(pipeline, batches(2, dtype=torch.float32))


def test_a_pipeline_that_is_gone_leaves_a_model_that_raises_at_once() -> None:
    model = on_a_grid()
    pipeline = make_pipeline(model, 2, autocast=BFLOAT16, graphs=FakeGraph)
    run(pipeline, batches(2, dtype=torch.float32))
    del pipeline
    model.layer3.set_exponent(14)
    with torch.autocast("cpu", BFLOAT16), pytest.raises(UserError, match="exact inversion needs"):
        model(batches(1, dtype=torch.float32)[0][0])


def test_a_state_from_before_a_stream_went_beyond_its_range_can_be_gone_on_from() -> None:
    model = on_a_grid()
    pipeline = make_pipeline(model, 2, autocast=BFLOAT16, graphs=FakeGraph)
    before = copy.deepcopy(pipeline.state_dict())
    model.get_parameter("bn1.weight").data.fill_(1e4)
    with pytest.raises(NotFiniteError, match="range of its grid"):
        run(pipeline, batches(2, dtype=torch.float32))
    pipeline.load_state_dict(before)
    run(pipeline, batches(2, dtype=torch.float32))


@pytest.mark.parametrize("graphed", [False, True])
def test_in_a_loop_of_ones_own_a_gpu_tells_of_it_a_step_later(graphed: bool) -> None:
    model = on_a_grid()
    for saturation in saturations_in(model):
        saturation.deferred = True  # as on a GPU

    def step(images: Tensor) -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", BFLOAT16):
            loss = model(images).float().square().sum()
        loss.backward()
        return loss

    images = batches(1, dtype=torch.float32)[0][0]
    call = GraphedStep(step, model, make_graph=FakeGraph) if graphed else step

    def call_twice() -> None:
        call(images)
        call(images)

    for _ in range(3):
        call_twice()
    weight = model.get_parameter("bn1.weight").data
    weight.fill_(1e4)
    with pytest.raises(UserError, match="exact inversion needs"):
        call_twice()
    weight.fill_(1.0)
    call_twice()


def coarser_weights(model: PetraRevNet) -> None:
    model.load_state_dict({**model.state_dict(), "layer2.exponent": torch.tensor(7)})


CHANGES: list[tuple[Callable[[PetraRevNet], None], str]] = [
    (lambda model: model.set_streams("bfloat16"), r"layer1.0 went from fixed16 streams in steps of 2\^-8 to bfloat16"),
    (lambda model: model.layer2.set_exponent(7), r"layer2.* from fixed16 streams in steps of 2\^-8 to .*2\^-7"),
    (lambda model: model.set_coupling([1.0, 1.0, 0.0, 1.0]), "layer3.* from coupling 1 to coupling 0"),
    (coarser_weights, r"layer2.*2\^-7"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_what_carries_the_streams_stays_while_any_are_in_flight(
    change: Callable[[PetraRevNet], None], message: str
) -> None:
    model = on_a_grid()
    pipeline = make_pipeline(model, 3, autocast=BFLOAT16)
    state, batch = copy.deepcopy(model.state_dict()), batches(1, dtype=torch.float32)[0]
    pipeline.step(*batch)
    change(model)
    for go_on in (lambda: pipeline.step(*batch), pipeline.drain):
        with pytest.raises(UserError, match=f"{message}.* while micro-batches are in flight .1.*drain"):
            go_on()
    model.set_streams("fixed16")
    model.load_state_dict(state)
    pipeline.drain()
    change(model)
    pipeline.step(*batch)


def test_a_state_goes_on_with_streams_of_its_own_type_alone() -> None:
    pipeline = make_pipeline(on_a_grid(), 2, autocast=BFLOAT16)
    pipeline.step(*batches(1, dtype=torch.float32)[0])
    state = pipeline.state_dict()
    with pytest.raises(UserError, match=r"the state has fixed16 streams in steps of 2\^-8, this .* float32 streams"):
        make_pipeline(make_model(torch.float32), 2, autocast=BFLOAT16).load_state_dict(state)
