"""Layouts: units into stages, stages onto ranks."""

from collections.abc import Callable
from itertools import accumulate, combinations, pairwise

import pytest
import timm
from hypothesis import given, settings
from hypothesis import strategies as st

import petra_zoo  # noqa: F401 - registers the models
from petra_zoo.petra import Costs, Layout, Pipeline, World, assign_stages, balance, count_operations


def slowest(costs: list[float], sizes: list[int], discount: float) -> float:
    stages, start = [], 0
    for size in sizes:
        stages.append(sum(costs[start : start + size]))
        start += size
    return max(*stages[:-1], stages[-1] * discount) if len(stages) > 1 else stages[0] * discount


@settings(max_examples=100, deadline=None)
@given(
    costs=st.lists(st.integers(1, 50).map(float), min_size=1, max_size=8),
    data=st.data(),
    discount=st.sampled_from([0.75, 1.0]),
)
def test_no_partition_is_faster(costs: list[float], data: st.DataObject, discount: float) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    found = balance(costs, stages, discount)
    assert len(found) == stages
    assert sum(found) == len(costs)
    best = min(
        slowest(costs, [b - a for a, b in zip((0, *cuts), (*cuts, len(costs)), strict=True)], discount)
        for cuts in combinations(range(1, len(costs)), stages - 1)
    )
    assert slowest(costs, found, discount) <= best * (1 + 1e-12)


def test_operations_are_counted_by_unit() -> None:
    model = timm.create_model("petra_revnet18")
    operations = count_operations(model, (3, 224, 224))
    assert len(operations) == len(model.units()) == 10
    stem = 2 * 64 * 3 * 49 * 112 * 112
    block = 2 * 2 * 64 * 64 * 9 * 56 * 56
    assert operations[:3] == [stem, block, block]
    assert operations[-1] == 2 * 512 * 1000


def test_counting_operations_leaves_the_model_alone() -> None:
    model = timm.create_model("petra_revnet_tiny").train()
    count_operations(model, (3, 32, 32))
    assert model.training
    assert not next(model.parameters()).is_meta
    assert int(model.bn1.num_batches_tracked) == 0


@settings(max_examples=100, deadline=None)
@given(data=st.data(), n=st.integers(1, 7))
def test_no_partition_is_faster_on_devices_of_different_speed(data: st.DataObject, n: int) -> None:
    numbers = st.lists(st.integers(1, 50).map(float), min_size=n, max_size=n)
    costs, last = data.draw(numbers), data.draw(numbers)
    stages = data.draw(st.integers(1, n))
    speed = data.draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=stages, max_size=stages))

    def time(sizes: list[int]) -> float:
        ends = list(accumulate(sizes))
        parts = [sum(costs[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
        parts[-1] = sum(last[n - sizes[-1] :])
        return max(part / s for part, s in zip(parts, speed, strict=True))

    found = balance(costs, stages, last_stage_costs=last, device_speed=speed)
    everything = ([b - a for a, b in pairwise((0, *cuts, n))] for cuts in combinations(range(1, n), stages - 1))
    assert sum(found) == n
    assert time(found) <= min(map(time, everything)) * (1 + 1e-12)


def test_stages_are_assigned_to_the_ranks_that_they_suit() -> None:
    assert assign_stages([1, 1, 1, 3], 2) == [range(0, 3), range(3, 4)]
    assert assign_stages([1, 1, 1, 3], 2, [1.0, 0.5]) == [range(0, 3), range(3, 4)]
    assert assign_stages([2, 2, 2], 2, [2.0, 1.0]) == [range(0, 2), range(2, 3)]
    assert assign_stages([2, 2, 2], 2, [1.0, 2.0]) == [range(0, 1), range(1, 3)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: assign_stages([1.0, 1.0], 3), "choose 1 to 2"),
        (lambda: balance([1.0, 1.0], 3), "choose 1 to 2"),
        (lambda: balance([1.0, 1.0], 2, device_speed=[1.0]), "one for each stage"),
        (lambda: balance([1.0, 1.0], 2, device_speed=[1.0, 0.0]), "positive"),
        (lambda: balance([1.0, 1.0], 2, last_stage_costs=[1.0]), "1 last-stage costs for 2 units"),
    ],
)
def test_lists_that_do_not_fit_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


SIZE = (3, 8, 8)


def test_a_layout_says_which_units_and_stages_are_where() -> None:
    model = timm.create_model("petra_revnet_tiny")
    layout = Layout.of(model, 5, ranks=2, input_size=SIZE)
    assert [i for owned in layout.stages for i in owned] == list(range(14))
    assert [j for owned in layout.ranks for j in owned] == list(range(5))
    assert [*layout.units_of_rank(0), *layout.units_of_rank(1)] == list(range(14))
    assert [layout.stage_of(owned.stop - 1) for owned in layout.stages] == list(range(5))
    assert sum(layout.sizes) == 14
    assert max(layout.loads()) == 1.0
    assert layout.efficiency() == pytest.approx(sum(layout.loads()) / 2)
    assert layout.efficiency(delayed=False) == 0.5, "ranks of an exact method wait for each other"


def test_a_last_stage_that_keeps_its_graph_costs_less() -> None:
    model = timm.create_model("petra_revnet_tiny")
    for method, share in (("petra", 0.75), ("dsp", 0.75), ("delayed", 1.0), ("backprop", 1.0)):
        costs = Costs.counted(model, SIZE, method)
        assert costs.in_last == [cost * share for cost in costs.each]


def test_costs_are_asked_for_only_where_they_decide() -> None:
    model = timm.create_model("petra_revnet_tiny")
    model.pretrained_cfg = {}
    assert Layout.of(model, [7, 7]).loads() == [1.0]
    assert Layout.of(model, 14, ranks=14).sizes == [1] * 14
    with pytest.raises(ValueError, match=r"does not say its input size: give input_size=\(C, H, W\)"):
        Layout.of(model, 3)
    with pytest.raises(ValueError, match="loads are not known without costs"):
        Layout.of(model, [7, 7], ranks=2).loads()


def test_layouts_that_do_not_fit_say_what_would() -> None:
    model = timm.create_model("petra_revnet_tiny")
    with pytest.raises(ValueError, match="3 processes for 2 stages: launch 1 to 2, or set stages=3 or more"):
        Layout.of(model, [7, 7], ranks=3)
    with pytest.raises(ValueError, match="must give one speed for each of 2 processes"):
        Layout.of(model, [7, 7], ranks=2, device_speed=[1.0])
    layout = Layout.of(model, [7, 7])
    with pytest.raises(ValueError, match=r"of 14 units on 1 ranks, .* there are 2 ranks"):
        Pipeline(model, layout, world=World(rank=0, size=2, peers=(0, 1)))
    with pytest.raises(ValueError, match="the model has 10 units"):
        Pipeline(timm.create_model("petra_revnet18"), layout)
