"""DistributedDataParallel around a reversible model: two gloo processes equal one."""

import os
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import petra_zoo  # noqa: F401 - registers the models
from tests.reversible.blocks import worst


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    norm = {"norm_layer": "groupnorm1"}  # no statistics over the batch: half batches add up
    model = timm.create_model("petra_revnet_tiny", num_classes=5, zero_init_last=False, **norm)
    return model.double().train()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(8) % 5


def worker(rank: int, folder: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = DistributedDataParallel(make_model())
    images, labels = batch()
    mine = slice(4 * rank, 4 * rank + 4)
    torch.nn.functional.cross_entropy(model(images[mine]), labels[mine]).backward()
    if rank == 0:
        torch.save([p.grad for p in model.parameters()], f"{folder}/gradients.pt")
    dist.destroy_process_group()


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    found = torch.load(tmp_path / "gradients.pt")
    model = make_model()
    images, labels = batch()
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    assert worst(found, [p.grad for p in model.parameters()]) < 1e-10
