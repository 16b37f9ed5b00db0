"""`petra-zoo lr`: the loss at a rate belongs to weights trained at it, and the rule is the one that is stated."""

import json
from pathlib import Path
from typing import Any

import pytest

from petra_zoo.errors import UserError
from petra_zoo.petra import Pipeline
from petra_zoo.settings.recipe import Recipe
from petra_zoo.training import rate_range
from petra_zoo.training.rate_range import RULE, Hold, RateRange, exponential, try_rates
from tests.cli.test_main import petra_zoo
from tests.training.test_train import QUICK

SMALL = {**QUICK, "batch_size": 8}
HOLD = Hold(0, 1, 1)


@pytest.mark.parametrize(
    ("method", "k"),
    [
        ("petra", 2),
        pytest.param("petra", 1, marks=pytest.mark.slow),
        pytest.param("petra", 5, marks=pytest.mark.slow),
        pytest.param("backprop", 2, marks=pytest.mark.slow),
    ],
)
def test_a_loss_counts_when_its_micro_batch_has_met_only_weights_trained_at_the_rate(
    monkeypatch: pytest.MonkeyPatch, method: str, k: int
) -> None:
    ticks: list[tuple[float, list[int], int | None, float | None]] = []  # rate, updates by stage, what came out
    real = Pipeline.step

    def step(self: Pipeline, *batch: Any) -> Any:
        output = real(self, *batch)
        rates = {group["lr"] for stage in self.stages for group in stage.optimizer.param_groups}  # type: ignore[union-attr]
        assert len(rates) == 1, "all stages have a rate from the same tick on"
        loss = None if output.loss is None else float(output.loss)
        ticks.append((rates.pop(), [stage.updates for stage in self.stages], output.micro_batch, loss))
        return output

    monkeypatch.setattr(Pipeline, "step", step)
    wanted = [0.001, 0.01]
    found = try_rates(Recipe(**SMALL, method=method, accumulation_steps=k), wanted)
    delay = 6 if method == "petra" else 0
    for rate, loss in zip(wanted, found.losses, strict=True):
        # In force behind the tick that set it; the last tick at a rate sets the next one.
        set_in = min((i for i, tick in enumerate(ticks) if tick[0] == rate), default=-1) if rate > wanted[0] else -1
        last = set_in + found.held if rate > wanted[0] else ticks.index(next(tick for tick in ticks if tick[0] != rate))
        counted = range(last - found.counted + 1, last + 1)
        assert loss == pytest.approx(sum(ticks[i][3] or 0.0 for i in counted) / k)
        assert counted[0] - set_in > delay
        fed_in = ticks[counted[0]][2]
        assert fed_in is not None
        before = ticks[set_in][1] if set_in >= 0 else [0] * 4
        assert all(now > then for now, then in zip(ticks[fed_in - 1][1], before, strict=True))


def test_a_tenth_of_the_rate_with_the_lowest_smoothed_loss_is_suggested() -> None:
    rates = exponential(1e-4, 1.0, 9)
    found = RateRange.of(rates, [2.3, 2.3, 2.2, 2.0, 1.5, 1.0, 0.9, 1.4, 2.5], HOLD, diverged=False)
    assert found.smoothed[5] == pytest.approx((2.0 + 1.5 + 1.0 + 0.9 + 1.4) / 5)
    assert found.lowest == rates[5]
    assert (found.suggestion, found.rule) == (float(f"{rates[5] / 10:.2g}"), RULE)


@pytest.mark.parametrize(
    ("losses", "why"),
    [
        ([2.3, 2.2, 2.0, 1.5, 1.0, 0.5], "still falls at the largest rate"),
        ([2.3, 2.3, 2.3, 2.4, 2.3, 2.3], "has not fallen"),
        ([2.3, 9.0], "runs away at once"),
    ],
)
def test_where_there_is_no_minimum_nothing_is_suggested(losses: list[float], why: str) -> None:
    found = RateRange.of(exponential(1e-4, 1.0, 6), losses, HOLD, diverged=len(losses) < 6)
    assert found.suggestion is None
    assert why in found.rule


def test_the_command_prints_the_line_to_lay_over_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    losses = [2.3, 2.2, 2.0, 1.5, 1.0, 0.5, 0.4, 3.0]
    monkeypatch.setattr(rate_range, "try_rates", lambda recipe, rates: RateRange.of(rates, losses, HOLD, diverged=True))
    done = petra_zoo("lr", "digits/petra_revnet_tiny", "--rates", "8", "--plot", "curve.png")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]
    found = json.loads(petra_zoo("lr", "digits/petra_revnet_tiny", "--rates", "8", "--json").stdout)
    assert done.stdout.splitlines()[-1] == f"lr={found['suggestion']:g}"
    losses[-2:] = [0.3, 0.2]
    monkeypatch.setattr(rate_range, "try_rates", lambda _, rates: RateRange.of(rates, losses, HOLD, diverged=False))
    done = petra_zoo("lr", "digits/petra_revnet_tiny", "--rates", "8")
    assert done.returncode == 1
    assert "still falls at the largest rate" in done.stderr


def test_replicas_are_refused_with_what_would_do() -> None:
    with pytest.raises(UserError, match="set data_parallel=1 update_size=16 for as many"):
        try_rates(Recipe(**SMALL, data_parallel=2), [0.1])
    with pytest.raises(UserError, match="the smaller one first"):
        exponential(1.0, 0.1, 5)
