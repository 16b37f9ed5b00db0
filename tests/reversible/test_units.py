"""The contract of a unit and of a model made of units."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.reversible import (
    CoupledUnit,
    Evaluation,
    FunctionUnit,
    Gradients,
    Residue,
    Reversal,
    Streams,
    Unit,
    backpropagate,
    merge,
    units_of,
)
from tests.reversible.blocks import gradients, parameters_of, run_plainly, worst


class HalvingUnit(Unit):
    """(b, a) -> (a // 2, b) on integers in floating point: the bit that the division drops is the residue."""

    reversible = True

    def forward(self, *streams: Tensor) -> Streams:
        return self.evaluate(*streams).streams

    def evaluate(self, *streams: Tensor) -> Evaluation:
        b, a = streams
        half = torch.floor(a / 2)
        return Evaluation((a / 2 + (half - a / 2).detach(), b.clone()), ((a - 2 * half).to(torch.bool),))

    def reverse(
        self,
        outputs: Streams,
        output_gradients: Gradients,
        parameters: Sequence[Tensor],
        residue: Residue = (),
        *,
        owned: bool = False,
    ) -> Reversal:
        half, b = outputs
        (bit,) = residue
        d_half, d_b = output_gradients
        self.inputs = (b, 2 * half + bit.to(half.dtype))
        return Reversal(self.inputs, (d_b, None if d_half is None else d_half / 2), ())


def test_a_residue_is_kept_for_the_unit_that_dropped_it() -> None:
    units = [HalvingUnit(f"unit{i}") for i in range(4)]
    b, a = (torch.randint(0, 1000, (3, 5, 4)).double().requires_grad_() for _ in range(2))
    received = [(b, a)]
    for unit in units[:-1]:
        received.append(unit(*received[-1]))
    of_plain, plain = gradients(lambda: run_plainly(units, (b, a)), (b, a))
    of_reversible, reversible = gradients(lambda: backpropagate(units, (b, a)), (b, a))
    assert all(map(torch.equal, of_plain, of_reversible))
    assert all(map(torch.equal, plain, reversible))
    for unit, inputs in zip(units, received, strict=True):
        assert all(map(torch.equal, unit.inputs, inputs))


def token_units(depth: int) -> list[Unit]:
    """Coupled blocks on tokens [B, T, C], behind a unit without an inverse and before another."""

    def coupled(i: int) -> CoupledUnit:
        f = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)).double()
        return CoupledUnit(
            f"block{i}", f, branch=f, activate=lambda x: x, coupling=lambda: 0.5, starts=i == 0, anchor=i == 2
        )

    embed, head = nn.Linear(4, 6).double(), nn.Linear(6, 3).double()
    return [
        FunctionUnit("embed", lambda x: (embed(x),), {"embed": embed}),
        *(coupled(i) for i in range(depth)),
        FunctionUnit("head", lambda b, a: (head(merge(b, a, 0.5)).mean(dim=1),), {"head": head}),
    ]


def test_streams_may_be_tokens() -> None:
    torch.manual_seed(0)
    units = token_units(5)
    tokens = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    wanted = [tokens, *parameters_of(units)]
    of_plain, plain = gradients(lambda: run_plainly(units, (tokens,)), wanted)
    of_reversible, reversible = gradients(lambda: backpropagate(units, (tokens,)), wanted)
    assert torch.equal(of_plain[0], of_reversible[0])
    assert worst(reversible, plain) < 1e-10


class Model(nn.Module):
    def __init__(self, units: list[Unit]) -> None:
        super().__init__()
        self.listed = units

    def units(self) -> list[Unit]:
        return self.listed


def test_units_of_gives_a_models_units() -> None:
    units = token_units(2)
    assert units_of(Model(units)) == units


def test_units_may_be_generated() -> None:
    units = token_units(2)
    model = Model([])
    model.units = lambda: (unit for unit in units)  # type: ignore[assignment, return-value]
    assert units_of(model) == units


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), r"Linear has no units\(\): .*petra-zoo convert .*docs/extending.md"),
        (Model([nn.Linear(2, 2)]), r"lists a Linear, which is no petra_zoo.reversible.Unit"),
        (Model([HalvingUnit("a"), HalvingUnit("b"), HalvingUnit("a")]), r"two units named 'a'"),
        (Model([]), r"is empty"),
        (Model(HalvingUnit("a")), r"gives a HalvingUnit: expected a list of units"),  # type: ignore[arg-type]
    ],
)
def test_units_of_says_in_one_line_what_is_wrong(model: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        units_of(model)
    assert "\n" not in str(caught.value)
