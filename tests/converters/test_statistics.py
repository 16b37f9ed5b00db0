"""Batch-norm re-estimation."""

import copy

import pytest
import torch
from torch import nn

from petra_zoo.converters import re_estimate
from petra_zoo.errors import UserError
from tests.converters.networks import images


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.Dropout(0.5), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    )


def test_statistics_become_averages_over_batches() -> None:
    model = network().eval()
    model[1].running_mean.fill_(7.0)
    batches = [images(n, 8, seed) for seed, n in enumerate((4, 6, 8))]
    assert re_estimate(model, batches) == 18
    with torch.no_grad():
        outputs = [model[0](batch) for batch in batches]
    means = torch.stack([x.mean((0, 2, 3)) for x in outputs])
    variances = torch.stack([x.var((0, 2, 3)) for x in outputs])
    assert torch.allclose(model[1].running_mean, means.mean(0), atol=1e-6)
    assert torch.allclose(model[1].running_var, variances.mean(0), rtol=1e-5)
    assert int(model[1].num_batches_tracked) == 3


def test_modes_and_momenta_are_restored_and_dropout_is_off() -> None:
    model = network()
    model[3].eval(), model[4].eval()
    state = torch.get_rng_state()
    re_estimate(model, [images(4, 8)])
    assert [m.training for m in model] == [True, True, True, False, False]
    assert [model[1].momentum, model[4].momentum] == [0.3, 0.1]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("batches", [[], [torch.zeros(1, 3, 5, 5)]])
def test_without_enough_images_everything_stays(batches: list[torch.Tensor]) -> None:
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="images"):
        re_estimate(model, batches)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model[1].momentum == 0.3


def test_with_a_source_only_what_differs_from_it_moves() -> None:
    source = network().eval()
    source[1].running_mean.normal_(), source[1].running_var.uniform_(0.5, 2.0)
    same, other = copy.deepcopy(source), copy.deepcopy(source)
    with torch.no_grad():
        other[0].weight.mul_(2.0), other[0].bias.add_(1.0)
    before = {name: value.clone() for name, value in source.state_dict().items()}
    batches = [5.0 + images(8, 8, seed) for seed in range(3)]  # unlike what the source's statistics say
    assert re_estimate(same, batches, source) == 24
    for i in (1, 4):
        assert torch.allclose(same[i].running_mean, before[f"{i}.running_mean"], atol=1e-5)
        assert torch.allclose(same[i].running_var, before[f"{i}.running_var"], rtol=1e-5)
    re_estimate(other, batches, source)
    assert torch.allclose(other[1].running_var, 4 * before["1.running_var"], rtol=1e-3)
    with torch.no_grad():
        moved = torch.stack([(other[0](x) - source[0](x)).mean((0, 2, 3)) for x in batches]).mean(0)
    assert torch.allclose(other[1].running_mean, before["1.running_mean"] + moved, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items() if "num" not in name)
