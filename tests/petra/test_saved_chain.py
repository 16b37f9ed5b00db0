"""A small pipeline's state from two processes: the same as from one, and back into both."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from petra_zoo.checkpoints.packing import to_safetensors
from petra_zoo.checkpoints.pipeline_files import to_files
from petra_zoo.petra import Pipeline
from petra_zoo.petra.pipeline_state import PipelineState
from tests.petra.chain import Chain, data, make_chain_pipeline
from tests.petra.processes import own_world, run_processes

METHODS = ("petra", "dsp", "delayed", "backprop")
SAVED_BEHIND = 7


def sgd(named: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for _, p in named], 0.05, momentum=0.9)


def pipeline_of(method: str, **options: Any) -> Pipeline:
    return make_chain_pipeline(Chain(), method=method, optimizer=sgd, accumulation_steps=2, **options)


def run(pipeline: Pipeline, feed: list[tuple[Tensor, Tensor]], drain: bool = False) -> list[Tensor]:
    outputs = [pipeline.step(*batch) if pipeline.world.first else pipeline.step() for batch in feed]
    if drain:
        outputs += pipeline.drain()
        pipeline.links.finish()
    return [output.loss for output in outputs if output.loss is not None]


def files_of(pipeline: Pipeline) -> dict[str, bytes]:
    files = to_files(pipeline.state_dict(), with_clock=pipeline.world.last)
    return {name: to_safetensors(state) for name, state in files.items()}


def in_a_rank(states: dict[str, PipelineState]) -> dict[str, tuple[dict[str, bytes], list[Tensor], list[Tensor]]]:
    """By method: the files; the losses of going on; those of going on from the state that one process has saved."""
    world, found = own_world(), {}
    for method, state in states.items():
        pipeline, again = pipeline_of(method, world=world), pipeline_of(method, world=world)
        run(pipeline, data(SAVED_BEHIND))
        files = files_of(pipeline)
        straight = run(pipeline, data(12)[SAVED_BEHIND:], drain=True)
        again.load_state_dict(state, images=5)
        found[method] = (files, straight, run(again, data(12)[SAVED_BEHIND:], drain=True))
    return found


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_save_the_files_of_one_and_go_on_from_its_state(tmp_path: Path) -> None:
    states, files, expected = {}, {}, {}
    for method in METHODS:
        pipeline = pipeline_of(method)
        run(pipeline, data(SAVED_BEHIND))
        states[method], files[method] = copy.deepcopy(pipeline.state_dict()), files_of(pipeline)
        expected[method] = run(pipeline, data(12)[SAVED_BEHIND:], drain=True)
    first, second = run_processes(2, tmp_path, in_a_rank, states)
    for method in METHODS:
        assert {**first[method][0], **second[method][0]} == files[method], method
        for losses in second[method][1:]:
            assert torch.equal(torch.stack(losses), torch.stack(expected[method])), method
