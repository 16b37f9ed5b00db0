"""The study of a training step: contenders that compute the same."""

import pytest
import torch

from petra_zoo.bench.step_contenders import STEP_CONTENDERS, norm_updates, step_input, training_step


@pytest.mark.parametrize("name", [name for name, found in STEP_CONTENDERS.items() if found.installed])
def test_contenders_of_a_family_compute_the_same_step(name: str) -> None:
    contender = STEP_CONTENDERS[name]
    reference = next(other for other in STEP_CONTENDERS.values() if other.family == contender.family)
    x = step_input(contender.family, 2, 4, 6)
    losses, norms = [], []
    for kind in (reference, contender):
        model = kind.build(4, 4)
        losses.append(training_step(model, x))
        norms.append(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-4, atol=0)


def test_reversible_blocks_update_their_statistics_once_per_step() -> None:
    model = STEP_CONTENDERS["petra-zoo"].build(4, 4)
    assert norm_updates(model, step_input("streams", 2, 4, 6)) == 1
