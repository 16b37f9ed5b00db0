"""Partition of units into stages."""

from itertools import combinations

import timm
from hypothesis import given, settings
from hypothesis import strategies as st

import petra_zoo  # noqa: F401 - registers the models
from petra_zoo.petra import balance, count_operations


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
