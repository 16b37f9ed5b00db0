"""What draws random numbers draws the same in the forward and the reversal, and none that draws is missed."""

from collections.abc import Callable

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from petra_zoo.petra import Pipeline
from tests.petra.test_pipeline import batches, make_model, make_pipeline, run, sgd


def nothing(model: nn.Module) -> None:
    pass


def hook(model: nn.Module) -> None:
    model.layer1[1].conv1.register_forward_hook(lambda _m, _x, y: F.dropout(y, 0.5))


def replaced_method(model: nn.Module) -> None:
    conv = model.layer2[1].conv1
    forward = conv.forward
    conv.forward = lambda x: F.dropout(forward(x), 0.5)


def replaced_module(model: nn.Module) -> None:
    model.layer1[1].act1 = nn.RReLU()


def gradients(change: Callable[[nn.Module], None], rates: dict[str, float], method: str, late: bool) -> list[Tensor]:
    """Means of all micro-batches at fixed parameters; `late`: what draws comes in when the pipeline has run already."""
    model = make_model(**rates)
    data = batches(8)
    pipeline: Pipeline = make_pipeline(model, 3, method=method, accumulation_steps=8, optimizer=sgd(1.0, momentum=0.0))
    if late:
        pipeline.step(*data[0])
        pipeline.drain()
    change(model)
    before = [p.detach().clone() for p in model.parameters()]
    run(pipeline, data)
    return [then - p.detach() for then, p in zip(before, model.parameters(), strict=True)]


@pytest.mark.parametrize(
    ("change", "rates", "late"),
    [
        (nothing, {"drop_rate": 0.3, "drop_path_rate": 0.3, "drop_block_rate": 0.3}, False),
        (hook, {}, True),
        (replaced_method, {}, True),
        (replaced_module, {}, False),
    ],
)
def test_the_reversal_draws_what_the_forward_drew(
    change: Callable[[nn.Module], None], rates: dict[str, float], late: bool
) -> None:
    for found, expected in zip(
        gradients(change, rates, "petra", late), gradients(change, rates, "backprop", late), strict=True
    ):
        assert float((found - expected).norm()) < 1e-8 * float(expected.norm()) + 1e-11
