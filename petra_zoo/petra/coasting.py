"""Where an optimizer coasts to: its parameters some updates from now, by what its momentum will still do.

The gradients to come are unknown. If their mean is zero and their squares stay what they were, the mean of the
parameters n updates from now follows from the optimizer's state: the momentum decays, and what it still moves adds up.
For SGD that is theta - lr (m + m^2 + ... + m^n) v; for the Adam family the same with bias corrections. To repeat the
last step, theta - n lr v (SpecTrain, arXiv 1809.02839; "LWP" of arXiv 2003.11666), is to take the gradient as constant.
benchmarks/coasting has the measurement that decided between the two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import cache
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer

from petra_zoo.errors import UserError
from petra_zoo.petra.optimization import State

Values = dict[str, Any]  # a parameter group, or what an optimizer keeps of a parameter: torch leaves them untyped
Moved = list[tuple[Tensor, Tensor]]


class Coasting:
    """Where an optimizer's parameters will be; see the two ways below."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def ahead(self, updates: int) -> Moved:
        """Those that move, each with where it will be so many updates from now."""
        raise NotImplementedError

    def before_step(self) -> None:
        """To be called before every step of the optimizer."""

    def state_dict(self) -> State | None:
        """What a continuation needs beside the optimizer's state."""
        return None

    def load_state_dict(self, state: State | None) -> None:
        """Restores what `state_dict` gave."""


def coasting_of(optimizer: Optimizer) -> Coasting:
    """By the optimizer's state where its future follows from it, else by its last step.

    Raises:
        UserError: it has no momentum: nothing moves by itself.
    """
    if not any(map(_momentum, optimizer.param_groups)):
        raise UserError(
            f"weight_prediction goes by an optimizer's momentum, and {type(optimizer).__name__} has none as it is set: "
            "set momentum (or betas), take another optimizer, or weight_prediction=none"
        )
    if type(optimizer) in _motions() and all(map(_is_linear, optimizer.param_groups)):
        return CoastingByState(optimizer)
    return CoastingByStep(optimizer)


class CoastingByStep(Coasting):
    """Takes a step as lasting, but for the decay of momentum: theta + (m + ... + m^n) (theta - theta before the step).

    For any optimizer. Keeps a copy of its parameters, those before its last step.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        self.before: list[Tensor] | None = None

    def ahead(self, updates: int) -> Moved:
        if self.before is None:
            return []
        found: Moved = []
        for group in self.optimizer.param_groups:
            parameters, before = group["params"], self.before[len(found) :][: len(group["params"])]
            if not parameters:
                continue
            far = sum(_momentum(group) ** i for i in range(1, updates + 1))
            found += zip(parameters, torch._foreach_lerp(before, parameters, 1 + far), strict=True)
        return found

    @torch.no_grad()
    def before_step(self) -> None:
        now = [p.detach() for group in self.optimizer.param_groups for p in group["params"]]
        if self.before is None:
            self.before = [torch.empty_like(p) for p in now]
        torch._foreach_copy_(self.before, now)

    def state_dict(self) -> State | None:
        return None if self.before is None else {"before": self.before}

    def load_state_dict(self, state: State | None) -> None:
        self.before = None if state is None else [x.clone() for x in state["before"]]


class CoastingByState(Coasting):
    """Reads momentum off the optimizer's state and keeps nothing."""

    def ahead(self, updates: int) -> Moved:
        found: Moved = []
        motion_of = _motions()[type(self.optimizer)]
        for group in self.optimizer.param_groups:
            ages: dict[float, list[Tensor]] = defaultdict(list)  # one, unless some went without a gradient
            for p in group["params"]:
                if state := self.optimizer.state.get(p):
                    ages[float(state.get("step", 0))].append(p)
            for age, parameters in ages.items():
                motion = motion_of(group, [self.optimizer.state[p] for p in parameters], age, updates)
                found += zip(parameters, motion.of(parameters), strict=True)
        return found


class Motion(NamedTuple):
    """Parameters theta of equal age will be at `keep` theta - `go` numerators / denominators."""

    keep: float
    go: float
    numerators: list[Tensor]
    denominators: list[Tensor] | None = None

    def of(self, parameters: list[Tensor]) -> tuple[Tensor, ...]:
        """Where they will be."""
        kept = parameters if self.keep == 1.0 else torch._foreach_mul(parameters, self.keep)
        if self.denominators is None:
            return torch._foreach_add(kept, self.numerators, alpha=-self.go)
        return torch._foreach_addcdiv(kept, self.numerators, self.denominators, value=-self.go)


def _momentum(group: Values) -> float:
    """How much of a group's step the next one takes over."""
    betas = group.get("betas") or (0.0,)
    found = group.get("momentum")
    return float(betas[0] if found is None else found)


def _is_linear(group: Values) -> bool:
    """Whether the mean step is the mean gradient's, and its factors are known without asking a GPU for its count."""
    on_device = group.get("capturable") or (group.get("fused") and any(p.is_cuda for p in group["params"]))
    return not (group.get("caution") or group.get("clipping_threshold") or on_device)


@cache
def _motions() -> dict[type[Optimizer], Callable[[Values, list[Values], float, int], Motion]]:
    from timm.optim import SGDW, AdamWLegacy, NAdamW  # here, so that the engine is imported without timm

    return {SGD: _sgd, SGDW: _sgd, Adam: _adam, AdamW: _adam, AdamWLegacy: _adam, NAdam: _nadam, NAdamW: _nadamw}


def _sgd(group: Values, states: list[Values], age: float, updates: int) -> Motion:
    """With momentum, classical or Nesterov's; a coupled weight decay is part of the gradients to come."""
    lr, m, kept = float(group["lr"]), group["momentum"], _kept(group)
    coupled = 0.0 if _decouples(group) else group["weight_decay"]

    def run(theta: float, v: float) -> float:
        for _ in range(updates):
            g, theta = coupled * theta, kept * theta
            v = m * v + (1 - group["dampening"]) * g
            theta -= lr * (g + m * v if group["nesterov"] else v)
        return theta

    # Linear in (theta, v): run on (1, 0) and (0, 1) it gives their factors.
    keep = run(1.0, 0.0) if group["weight_decay"] else 1.0
    return Motion(keep, -run(0.0, 1.0), [state["momentum_buffer"] for state in states])


def _adam(group: Values, states: list[Values], age: float, updates: int) -> Motion:
    beta = group["betas"][0]
    factors = [beta**i / (1 - beta ** (age + i)) for i in range(1, updates + 1)]
    return _adaptive(group, states, age, factors)


def _nadamw(group: Values, states: list[Values], age: float, updates: int) -> Motion:
    """timm's: Adam whose numerator has the gradient once more, so the momentum one decay less."""
    beta = group["betas"][0]
    factors = [beta ** (i + 1) / (1 - beta ** (age + i)) for i in range(1, updates + 1)]
    return _adaptive(group, states, age, factors)


def _nadam(group: Values, states: list[Values], age: float, updates: int) -> Motion:
    """torch's, whose momentum factor mu grows with the number of steps."""
    beta, decay = group["betas"][0], group["momentum_decay"]
    mus = [beta * (1 - 0.5 * 0.96 ** ((age + i) * decay)) for i in range(1, updates + 2)]
    product, factors = float(states[0]["mu_product"]) * mus[0], []
    for i, mu in enumerate(mus[1:], start=1):
        product *= mu
        factors.append(mu * beta**i / (1 - product))
    return _adaptive(group, states, age, factors)


def _adaptive(group: Values, states: list[Values], age: float, factors: list[float]) -> Motion:
    """Steps lr * factor * m / (sqrt(v / (1 - beta2^age)) + eps), one after the other."""
    kept, go = _kept(group), 0.0
    for factor in factors:
        go = kept * go + float(group["lr"]) * factor
    root = sqrt(1 - group["betas"][1] ** age)  # taken out of the denominators, which saves a pass over them
    squares = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
    denominators = torch._foreach_sqrt([state[squares] for state in states])
    torch._foreach_add_(denominators, group["eps"] * root)
    return Motion(kept ** len(factors), go * root, [state["exp_avg"] for state in states], list(denominators))


def _decouples(group: Values) -> bool:
    """Whether the weight decay is none of the gradient's: torch says so, and those of timm here do it all."""
    return bool(group.get("decoupled_weight_decay", "corrected_weight_decay" in group))


def _kept(group: Values) -> float:
    """What a decoupled weight decay leaves of a parameter in one update."""
    lr = float(group["lr"])
    scale = lr * lr / group["max_lr_snapshot"] if group.get("corrected_weight_decay") else lr
    return 1 - scale * group["weight_decay"] if _decouples(group) else 1.0
