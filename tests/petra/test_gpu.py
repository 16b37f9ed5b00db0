"""Two processes on one GPU: messages travel through pinned memory."""

from pathlib import Path
from typing import Any

import pytest
import torch

from petra_zoo.petra import World, join
from tests.petra.processes import run_processes
from tests.petra.test_pipeline import batches, make_model, make_pipeline, sgd

pytestmark = [pytest.mark.gpu, pytest.mark.dist, pytest.mark.timeout(300)]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
OPTIONS: list[dict[str, Any]] = [{}, {"autocast": torch.bfloat16}, {"weight_prediction": "head"}]


def train(world: World, options: dict[str, Any]) -> list[float]:
    torch.backends.cudnn.deterministic = True
    model = make_model(torch.float32).to(memory_format=torch.channels_last)
    if world.size == 1:
        model = model.to(world.device)
    pipeline = make_pipeline(model, 4, optimizer=sgd(0.02), world=world, **options)
    losses = []
    for images, labels in batches(8, dtype=torch.float32):
        fed = (images.to(world.device, memory_format=torch.channels_last), labels.to(world.device))
        losses.append(pipeline.step(*fed).loss if world.first else pipeline.step().loss)
    losses += [output.loss for output in pipeline.drain()]
    pipeline.links.finish()
    return [float(loss) for loss in losses if loss is not None]


def train_a_rank() -> list[list[float]]:
    world = join(torch.device("cuda"))  # where there are two GPUs, each takes one, and NCCL carries the messages
    return [train(world, options) for options in OPTIONS]


@needs_cuda
def test_two_processes_on_one_gpu_train_as_one_does(tmp_path: Path) -> None:
    found = run_processes(2, tmp_path, train_a_rank)[-1]
    for losses, options in zip(found, OPTIONS, strict=True):
        assert losses == pytest.approx(train(World(device=torch.device("cuda", 0)), options), rel=1e-3)
