"""What other processes wait for although it takes longer than a message may: data, first works, disks, callbacks."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from petra_zoo.petra.stage import Stage
from petra_zoo.training import preparation, run_directory
from petra_zoo.training.callbacks import Callback
from petra_zoo.training.progress import Reporter
from petra_zoo.training.run import train
from tests.petra.processes import run_processes

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(180)]
LIMIT, BUSY = 2, 6.0  # seconds: of a message; of what takes longer
SETTINGS = ["epochs=2", "device=cpu", "batch_size=64", "balance=operations", f"link_timeout={LIMIT}"]


def slow_data(rank: int) -> None:
    real = preparation.Prepared.batches

    def batches(self: Any, loader: Any, start: int = 0) -> Iterator[Any]:
        for number, batch in enumerate(real(self, loader, start)):
            if number == 8 and rank == 0 and loader is self.train_loader:
                time.sleep(BUSY)
            yield batch

    preparation.Prepared.batches = batches  # type: ignore[method-assign]


def slow_first(name: str, at: int) -> Callable[[int], None]:
    def arrange(rank: int) -> None:
        real, left = getattr(Stage, name), [rank == at]

        def first(self: Stage, *args: Any) -> Any:
            if left[0]:
                left[0] = False
                time.sleep(BUSY)
            return real(self, *args)

        setattr(Stage, name, first)

    return arrange


def slow_disk(rank: int) -> None:
    real = run_directory._flush_to_disk

    def flush(path: Path) -> None:
        if path.name == "model.safetensors":
            time.sleep(BUSY)
        real(path)

    run_directory._flush_to_disk = flush


class Slow(Callback):
    def on_validation(self, event: Any) -> None:
        time.sleep(BUSY)


CASES: dict[str, tuple[Callable[[int], None] | None, int, list[Callback]]] = {
    "data": (slow_data, 1, []),
    "another replica's data": (slow_data, 2, []),
    "a first forward": (slow_first("forward", 0), 1, []),
    "a first backward": (slow_first("backward", 0), 1, []),
    "a disk": (slow_disk, 1, []),
    "a callback": (None, 1, [Slow()]),
}


def train_with(case: str, folder: str) -> float:
    torch.set_num_threads(1)
    arrange, replicas, callbacks = CASES[case]
    if arrange:
        arrange(int(os.environ["RANK"]))
    changes = [*SETTINGS, f"stages={2 // replicas}", f"data_parallel={replicas}", f"output={folder}"]
    return train("digits/petra_revnet_tiny", changes, callbacks=callbacks, reporter=Reporter(quiet=True)).delay


@pytest.mark.parametrize("case", CASES)
def test_a_run_outlives_what_takes_longer_than_a_message(case: str, tmp_path: Path) -> None:
    assert len(run_processes(2, tmp_path, train_with, case, str(tmp_path / "run"))) == 2
