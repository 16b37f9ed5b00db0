"""How many threads a run computes with."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from rich.console import Console

from petra_zoo.checkpoints.store import CHECKPOINTS, Store
from petra_zoo.settings.recipe import Recipe
from petra_zoo.training.progress import Reporter
from petra_zoo.training.run import train
from petra_zoo.training.threads import threads_for, threads_restored
from tests.training.test_train import QUICK


@pytest.fixture
def two_threads() -> Iterator[None]:
    with threads_restored():
        torch.set_num_threads(2)
        yield


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("model", "size", "batch_size", "said", "threads"),
    [
        ("petra_revnet_tiny", 8, 32, None, 1),
        ("petra_revnet_tiny", 8, 4096, None, None),
        ("petra_revnet18_cifar", 32, 32, None, None),
        ("petra_revnet_tiny", 8, 32, 2, 2),
    ],
)
def test_a_small_networks_operations_are_not_shared_out(
    model: str, size: int, batch_size: int, said: int | None, threads: int | None
) -> None:
    recipe = Recipe(model=model, dataset="digits", batch_size=batch_size, threads=said)
    found = threads_for(recipe, timm.create_model(model), (3, size, size), torch.device("cpu"))
    assert found == threads


@pytest.mark.usefixtures("two_threads")
def test_a_run_says_and_saves_its_threads_and_leaves_its_callers_alone(tmp_path: Path) -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    result = train(Recipe(**{**QUICK, "output": tmp_path / "run"}), reporter=Reporter(console))
    assert console.export_text().splitlines()[0].endswith("1 epoch of 4 micro-batches, 1 thread")
    checkpoint = Store(result.path / CHECKPOINTS).newest_good()
    assert checkpoint is not None
    assert checkpoint.manifest.threads == 1
    assert torch.get_num_threads() == 2
