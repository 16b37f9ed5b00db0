"""Residues: what a unit's reversal needs beside its outputs stays in its stage, in flight and in a saved state."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petra_zoo.petra import Layout, Optimization, Pipeline, find_method, measure
from petra_zoo.reversible import Evaluation, FunctionUnit, Gradients, Residue, Reversal, Streams, Unit, gradients_of
from tests.petra.test_pipeline import run, sgd

SIZE = (2, 3, 3)


def rounded(x: Tensor) -> Tensor:
    """The nearest integers, with the gradient of x."""
    return x + (x.round() - x).detach()


class HalvingUnit(Unit):
    """(b, a) -> (a // 2 + round(w b), b) on integers: the bit that the division drops is the residue."""

    reversible = True

    def __init__(self, name: str, anchor: bool = False) -> None:
        super().__init__(name, anchor)
        self.weight = nn.Parameter(torch.randn(1, 4, 1, 1, dtype=torch.float64))

    def forward(self, *streams: Tensor) -> Streams:
        return self.evaluate(*streams).streams

    def evaluate(self, *streams: Tensor) -> Evaluation:
        b, a = streams
        half = a / 2 + (torch.floor(a / 2) - a / 2).detach()
        return Evaluation((half + rounded(self.weight * b), b), ((a - 2 * half).detach().to(torch.bool),))

    def reverse(
        self,
        outputs: Streams,
        output_gradients: Gradients,
        parameters: Sequence[Tensor],
        residue: Residue = (),
        *,
        owned: bool = False,
    ) -> Reversal:
        (b_out, a_out), (d_b_out, d_a_out), (bit,) = outputs, output_gradients, residue
        assert d_b_out is not None
        b = a_out.detach().requires_grad_()
        with torch.enable_grad():
            step = rounded(self.weight * b)
        d_b, *d_parameters = gradients_of((step,), (d_b_out,), [b, *parameters])
        assert d_b is not None
        a = 2 * (b_out - step.detach()) + bit.to(b_out.dtype)
        return Reversal((a_out, a), (d_b if d_a_out is None else d_a_out + d_b, d_b_out / 2), tuple(d_parameters))


class Halvings(nn.Module):
    """An embedding on integers, halving units, and a head."""

    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(2, 8, 1).double()
        self.blocks = nn.ModuleList(HalvingUnit(f"block{i}", anchor=i == 3) for i in range(depth))
        self.head = nn.Linear(8, 10).double()

    def units(self) -> list[Unit]:
        def stem(x: Tensor) -> Streams:
            b, a = rounded(30 * self.stem(x)).chunk(2, dim=1)
            return b, a

        def head(b: Tensor, a: Tensor) -> Streams:
            return (self.head(torch.cat((b, a), 1).mean((2, 3)) / 30),)

        blocks = [block for block in self.blocks if isinstance(block, Unit)]
        return [FunctionUnit("stem", stem, {"stem": self.stem}), *blocks, FunctionUnit("head", head, {"h": self.head})]

    def forward(self, x: Tensor) -> Tensor:
        streams: Streams = (x,)
        for unit in self.units():
            streams = unit(*streams)
        return streams[0]


def data(n: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda: torch.randn(4, *SIZE, generator=generator, dtype=torch.float64)  # noqa: E731
    return [(draw(), torch.randint(0, 10, (4,), generator=generator)) for _ in range(n)]


def make(model: Any, stages: int, method: str, lr: float = 1.0, k: int = 1, last_stage: str = "graph") -> Pipeline:
    chosen = find_method(method).with_last_stage(last_stage)
    layout = Layout.of(model, stages, method=chosen, input_size=SIZE)
    return Pipeline(
        model, layout, method=chosen, optimization=Optimization(sgd(lr, momentum=0.0), accumulation_steps=k)
    )


@pytest.mark.parametrize(("stages", "last_stage"), [(1, "recompute"), (3, "graph"), (7, "graph"), (7, "recompute")])
@pytest.mark.parametrize("method", ["petra", "reversible", "dsp", "delayed", "backprop"])
def test_at_fixed_parameters_the_gradient_is_autograds(method: str, stages: int, last_stage: str) -> None:
    model, plain = Halvings(), Halvings()
    batches = data(6)
    before = copy.deepcopy(model.state_dict())
    pipeline = make(model, stages, method, k=len(batches), last_stage=last_stage)
    run(pipeline, batches)
    sum(F.cross_entropy(plain(x), y) for x, y in batches).backward()  # type: ignore[union-attr]
    for (name, p), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert expected.grad is not None
        found = before[name] - p.detach()
        torch.testing.assert_close(found, expected.grad / len(batches), rtol=1e-9, atol=1e-12, msg=name)
    assert not any(kept for stage in pipeline.stages for kept in stage.residues), "all of them were used"


def test_a_stage_keeps_the_residues_of_what_is_in_flight_in_it() -> None:
    pipeline = make(Halvings(), 7, "petra", lr=0.0)
    run(pipeline, data(20), drain=False)
    for j, stage in enumerate(pipeline.stages):
        (kept,) = stage.residues
        assert len(kept) == (2 * (6 - j) if stage.units[0].reversible else 0)
        assert all(residue[0].dtype == torch.bool for residue in kept.values())


@pytest.mark.parametrize("method", ["petra", "reversible"])
def test_a_restored_pipeline_has_its_residues_back(method: str) -> None:
    batches = data(14)
    straight, first, second = Halvings(), Halvings(), Halvings()
    run(make(straight, 7, method, lr=1e-3), batches)
    stopped = make(first, 7, method, lr=1e-3)
    run(stopped, batches[:9], drain=False)
    continued = make(second, 7, method, lr=1e-3)
    continued.load_state_dict(copy.deepcopy(stopped.state_dict()))
    run(continued, batches[9:])
    assert all(map(torch.equal, straight.state_dict().values(), second.state_dict().values()))


def test_frozen_units_keep_no_residue() -> None:
    model = Halvings()
    for part in (model.stem, *model.blocks[:2]):
        part.requires_grad_(False)
    pipeline = make(model, 7, "petra")
    run(pipeline, data(9), drain=False)
    assert [bool(stage.residues[0]) for stage in pipeline.stages] == [False] * 3 + [True] * 3 + [False]


def test_units_with_residues_are_measured() -> None:
    assert [unit.reversible for unit in measure(Halvings(), 2, SIZE, repeats=1).units] == [False, *[True] * 5, False]
