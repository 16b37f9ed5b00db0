"""The studies of a training step: contenders that compute the same, and what is measured of them."""

import pytest
import torch

from petra_zoo.bench.step_contenders import build_contender
from petra_zoo.bench.step_runs import norm_updates, training_step
from petra_zoo.bench.steps import LAYER, STREAMS, StepShape, installed

SMALL = StepShape(blocks=4, channels=4, batch_size=2, img_size=6)


@pytest.mark.parametrize("names", [STREAMS, LAYER[1:]], ids=["streams", "our layers"])
def test_contenders_compute_the_same_step(names: tuple[str, ...]) -> None:
    losses, norms = [], []
    for name in filter(installed, names):
        model, x = build_contender(name, SMALL)
        losses.append(training_step(model, x))
        norms.append(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    torch.testing.assert_close(losses, [losses[0]] * len(losses), rtol=1e-5, atol=0)
    torch.testing.assert_close(norms, [norms[0]] * len(norms), rtol=1e-4, atol=0)


def test_our_blocks_update_their_statistics_once_per_step() -> None:
    assert norm_updates(*build_contender("petra-zoo", SMALL)) == 1
