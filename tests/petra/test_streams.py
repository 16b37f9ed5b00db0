"""Streams in 16 bits under the engine: messages keep their bits, and the range of a grid is watched."""

import pytest
import torch

from petra_zoo.errors import UserError
from petra_zoo.models.petra_revnet import PetraRevNet
from petra_zoo.petra import NotFiniteError, Wire, World
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
    for stage in pipeline.stages:
        for saturation in stage.saturations:
            saturation.deferred = deferred
    model.layer3.set_exponent(14)
    with pytest.raises(NotFiniteError if deferred else UserError, match=r"range|needs"):
        run(pipeline, batches(8, dtype=torch.float32))
