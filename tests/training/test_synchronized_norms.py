"""Batch norms over all replicas: made on the CPU, where torch cannot run them, and run on a GPU."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from timm.utils import ModelEmaV3
from torch import nn

from petra_zoo.errors import UserError
from petra_zoo.petra import Optimization, Pipeline, World, join
from petra_zoo.training.finetuning import keep_statistics
from petra_zoo.training.ranks import average_statistics
from petra_zoo.training.synchronized_norms import synchronize_statistics
from tests.petra.processes import run_processes

REPLICAS = 2
SGD = Optimization(lambda named: torch.optim.SGD([p for _, p in named], 0.1))


@pytest.fixture
def world() -> Iterator[World]:
    """A replica on a GPU, as far as making the norms goes; its process group has this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(device=torch.device("cuda"), replicas=2, across=dist.new_group([0]))
    dist.destroy_process_group()


def norms(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def test_synchronised_norms_keep_the_weights_and_can_be_copied(world: World) -> None:
    model = timm.create_model("petra_revnet_tiny", num_classes=4)
    before = {name: id(p) for name, p in model.named_parameters()}
    synchronize_statistics(model, world)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    for one in (model, copy.deepcopy(model), ModelEmaV3(model).module):
        assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms(one).values())
        assert all(norm.process_group is world.across for norm in norms(one).values())  # type: ignore[misc]


def test_frozen_norms_stay_frozen(world: World) -> None:
    model = timm.create_model("petra_revnet_tiny", num_classes=4)
    keep_statistics(model.layer1)
    synchronize_statistics(model, world)
    model.train()
    for name, norm in norms(model).items():
        frozen = name.startswith("layer1.")
        assert norm.training is not frozen, name
        assert isinstance(norm, nn.SyncBatchNorm) is not frozen, name


def test_an_activation_inside_a_norm_stays(world: World) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4))
    synchronize_statistics(model, world)
    assert isinstance(model[1], nn.SyncBatchNorm)
    assert model.eval()(-100 * torch.ones(1, 3, 2, 2)).min() >= 0


def test_the_cpu_is_refused() -> None:
    with pytest.raises(UserError, match="sync_bn=true: torch synchronises batch norms on CUDA only"):
        synchronize_statistics(nn.BatchNorm2d(3), World())


def train_synchronised() -> list[torch.Tensor]:
    """Two updates of a replica; gives the first replica's parameters and statistics, gathered."""
    world = join(torch.device("cuda"), REPLICAS)
    torch.manual_seed(0)
    model: Any = timm.create_model("petra_revnet_tiny", num_classes=4).to(world.device, torch.float64).train()
    synchronize_statistics(model, world)
    pipeline = Pipeline(model, 3, optimization=SGD, world=world)
    for images, labels in halves()[world.replica]:
        pipeline.step(images.to(world.device), labels.to(world.device))
    pipeline.drain()
    average_statistics(model, world)
    return [x.detach().cpu() for x in pipeline.whole_model().state_dict().values()]


def halves() -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(6, 16, 3, 8, 8, generator=generator).double(), torch.arange(6 * 16).reshape(6, 16) % 4
    return [[(images[i, half::2], labels[i, half::2]) for i in range(6)] for half in range(2)]


@pytest.mark.gpu
@pytest.mark.dist
@pytest.mark.timeout(180)
def test_synchronised_replicas_equal_one_pipeline_with_larger_micro_batches(tmp_path: Path) -> None:
    """Both on one GPU, over gloo."""
    first, second = run_processes(REPLICAS, tmp_path, train_synchronised)
    torch.manual_seed(0)
    model: Any = timm.create_model("petra_revnet_tiny", num_classes=4).to("cuda", torch.float64).train()
    pipeline = Pipeline(model, 3, optimization=SGD)
    for (a, x), (b, y) in zip(*halves(), strict=True):
        pipeline.step(torch.cat([a, b]).cuda(), torch.cat([x, y]).cuda())
    pipeline.drain()
    for name, expected, *found in zip(model.state_dict(), model.state_dict().values(), first, second, strict=True):
        for one in found:
            error = (one.double() - expected.cpu().double()).norm() / expected.double().norm().clamp_min(1e-6).cpu()
            assert error < 1e-8, name
