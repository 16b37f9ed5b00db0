"""Coasting: the mean of what an optimizer does next, when the gradients to come have mean zero."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import create_optimizer_v2
from torch import Tensor

from petra_zoo.errors import UserError
from petra_zoo.petra.coasting import CoastingByState, CoastingByStep, coasting_of

BETAS = st.tuples(st.floats(0.05, 0.98), st.floats(0.1, 0.999))
DECAY = st.sampled_from([0.0, 0.1])
SETTINGS = st.one_of(
    st.fixed_dictionaries(
        {
            "opt": st.sampled_from(["sgd", "momentum", "sgdw", "sgdc"]),
            "momentum": st.floats(0.05, 0.99),
            "weight_decay": DECAY,
        }
    ),
    st.fixed_dictionaries(
        {
            "opt": st.sampled_from(["adamw", "adamwlegacy", "adamc", "nadamw", "nadamc"]),
            "betas": BETAS,
            "weight_decay": DECAY,
        }
    ),
    st.fixed_dictionaries({"opt": st.sampled_from(["adam", "nadam"]), "betas": BETAS}),
    st.fixed_dictionaries({"opt": st.just("momentum"), "dampening": st.just(0.3), "weight_decay": DECAY}),
    st.fixed_dictionaries(
        {"opt": st.just("nadam"), "betas": BETAS, "weight_decay": DECAY, "decoupled_weight_decay": st.just(True)}
    ),
    st.fixed_dictionaries({"opt": st.just("adamw"), "betas": BETAS, "amsgrad": st.just(True)}),
)


def make(options: dict[str, Any]) -> tuple[list[Tensor], torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(0)
    parameters = [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in ((3,), (2, 2))
    ]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.03}]
    return parameters, create_optimizer_v2(groups, lr=0.1, **options)


def step(parameters: list[Tensor], optimizer: torch.optim.Optimizer, seed: int, sign: float = 1.0) -> None:
    """One step, with gradients of random signs and of one size at all steps: Adam's squares stay what they are."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        size = torch.linspace(0.1, 2.0, p.numel(), dtype=torch.float64).view_as(p)
        p.grad = sign * size * (2 * torch.randint(0, 2, p.shape, generator=generator) - 1)
    optimizer.step()


@settings(max_examples=40, deadline=None)
@given(options=SETTINGS, past=st.integers(1, 8), updates=st.integers(1, 7), seed=st.integers(0, 99))
def test_an_optimizer_coasts_to_the_mean_of_two_opposite_futures(
    options: dict[str, Any], past: int, updates: int, seed: int
) -> None:
    parameters, optimizer = make(options)
    for i in range(past):
        step(parameters, optimizer, seed + i)
    coasting = coasting_of(optimizer)
    assert isinstance(coasting, CoastingByState)
    with torch.no_grad():
        found = {id(p): x for p, x in coasting.ahead(updates)}
    ends = []
    for sign in (1.0, -1.0):
        others, other = copy.deepcopy((parameters, optimizer))
        for i in range(updates):
            step(others, other, 1000 + i, sign)
        ends.append(others)
    for p, one, another in zip(parameters, *ends, strict=True):
        torch.testing.assert_close(found[id(p)], (one + another).detach() / 2, rtol=1e-9, atol=1e-12)


def test_parameters_of_different_age_coast_by_their_own() -> None:
    first, second = torch.ones(3).double().requires_grad_(), torch.ones(2).double().requires_grad_()
    alike, either = ({"lr": 0.1, "betas": (0.9, 0.99)} for _ in range(2))
    together = torch.optim.AdamW([first, second], **alike)  # type: ignore[arg-type]
    step([first], together, 0)  # the second has no gradient yet
    assert [p is first for p, _ in coasting_of(together).ahead(3)] == [True]
    step([first, second], together, 1)
    apart = [torch.optim.AdamW([torch.ones(n).double().requires_grad_()], **either) for n in (3, 2)]  # type: ignore
    step(apart[0].param_groups[0]["params"], apart[0], 0)
    for optimizer, p in zip(apart, (first, second), strict=True):
        own = optimizer.param_groups[0]["params"]
        own[0].grad = p.grad
        optimizer.step()
        with torch.no_grad():
            expected = coasting_of(optimizer).ahead(3)[0][1]
            found = {id(q): x for q, x in coasting_of(together).ahead(3)}
        assert torch.equal(found[id(p)], expected)


@given(past=st.integers(1, 6), updates=st.integers(1, 9))
@settings(max_examples=10, deadline=None)
def test_a_measured_step_of_classical_momentum_coasts_as_its_state_says(past: int, updates: int) -> None:
    parameters, optimizer = make({"opt": "momentum"})
    measured = CoastingByStep(optimizer)
    assert measured.ahead(updates) == []
    for i in range(past):
        measured.before_step()
        step(parameters, optimizer, i)
    with torch.no_grad():
        pairs = zip(measured.ahead(updates), coasting_of(optimizer).ahead(updates), strict=True)
        for (p, found), (q, expected) in pairs:
            assert p is q
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"opt": "muon"},
        {"opt": "lion"},
        {"opt": "adan"},
        {"opt": "nadamw", "caution": True},
        {"opt": "adamwlegacy", "clipping_threshold": 1.0},
        {"opt": "lookahead_sgd"},
        {"opt": "adamw", "capturable": True},
    ],
)
def test_where_the_state_does_not_say_the_last_step_does(options: dict[str, Any]) -> None:
    assert isinstance(coasting_of(make(options)[1]), CoastingByStep)


def test_an_optimizer_without_momentum_does_not_coast() -> None:
    for options in ({"opt": "sgd", "momentum": 0.0, "nesterov": False}, {"opt": "adafactor"}):
        with pytest.raises(UserError, match=r"goes by an optimizer's momentum, and \w+ has none as it is set: set"):
            coasting_of(make(options)[1])
