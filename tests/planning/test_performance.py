"""Predictions, against the closed forms of equal units without communication."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petra_zoo.petra import Profile
from petra_zoo.petra.unit_profile import UnitProfile
from petra_zoo.planning.cluster import Cluster, Link
from petra_zoo.planning.performance import forecast
from petra_zoo.planning.schedules import all_schedules

IDEAL = Cluster()
METHODS = tuple(all_schedules())
STREAMS, GRAPH, PARAMETERS, WORKING = 1000, 5000, 400, 6000


def equal_units(n: int, head_graph: float = 3.0) -> Profile:
    """Forward 1, recomputation 1, backward 2; `head_graph` is what the last unit costs with its graph."""
    unit = UnitProfile("block", True, False, 1.0, 3.0, 1.0, 2.0, PARAMETERS, STREAMS, STREAMS, GRAPH, WORKING)
    units = [unit] * n
    if head_graph != 3.0:
        units[-1] = UnitProfile(
            "head", True, False, 1.0, 3.0, 1.0, head_graph - 1, PARAMETERS, STREAMS, STREAMS, GRAPH, WORKING
        )
    return Profile("equal", 1, (3, 8, 8), None, "cpu", 1, "none", {}, tuple(units))


def seconds_per_micro_batch(profile: Profile, method: str, devices: int, m: int = 8) -> float:
    return 1 / forecast(profile, method, devices, IDEAL, micro_batches=m).images_per_second


@given(p=st.sampled_from([1, 2, 4, 8]), m=st.sampled_from([4, 8, 16, 32]), each=st.integers(1, 3))
def test_synchronous_schedules_of_equal_units(p: int, m: int, each: int) -> None:
    profile = equal_units(p * each)
    for method, cost in (("1f1b", 3), ("gpipe", 3), ("1f1b+checkpoint", 4)):
        assert seconds_per_micro_batch(profile, method, p, m) == pytest.approx(each * cost * (m + p - 1) / m)


@given(p=st.integers(2, 12))
def test_one_unit_per_stage(p: int) -> None:
    profile = equal_units(p)
    assert seconds_per_micro_batch(profile, "petra", p) == pytest.approx(4)
    assert seconds_per_micro_batch(profile, "dsp", p) == pytest.approx(4)
    assert seconds_per_micro_batch(profile, "delayed", p) == pytest.approx(3)


@given(n=st.integers(1, 20), m=st.integers(1, 8))
def test_one_device_is_plain_backpropagation(n: int, m: int) -> None:
    profile = equal_units(n)
    for method in METHODS:
        if method != "1f1b+checkpoint":
            prediction = forecast(profile, method, 1, IDEAL, micro_batches=m)
            assert prediction.efficiency == pytest.approx(1)
            assert prediction.images_per_second == pytest.approx(1 / (3 * n))


@pytest.mark.parametrize(
    ("p", "m", "over_1f1b", "over_checkpoint"),
    [(2, 4, 0.94, 1.25), (2, 8, 0.84, 1.12), (4, 4, 1.31, 1.75), (4, 8, 1.03, 1.38), (8, 8, 1.41, 1.88)],
)
def test_petra_with_every_stage_at_4_over_1f1b(p: int, m: int, over_1f1b: float, over_checkpoint: float) -> None:
    profile = equal_units(p, head_graph=4.0)
    petra = seconds_per_micro_batch(profile, "petra", p)
    plain = seconds_per_micro_batch(equal_units(p), "1f1b", p, m)
    checkpointed = seconds_per_micro_batch(equal_units(p), "1f1b+checkpoint", p, m)
    assert plain / petra == pytest.approx(over_1f1b, abs=0.006)
    assert checkpointed / petra == pytest.approx(over_checkpoint, abs=0.006)


def test_two_devices_give_7_eighths_of_two_backpropagations() -> None:
    assert forecast(equal_units(7), "petra", 2, IDEAL).efficiency == pytest.approx(0.875)
    assert forecast(equal_units(8), "delayed", 2, IDEAL).efficiency == pytest.approx(1)


def test_data_parallel_shares_the_micro_batches_and_hides_its_all_reduce_behind_the_last_backward() -> None:
    profile = equal_units(10)
    assert forecast(profile, "ddp", 8, IDEAL).efficiency == pytest.approx(1)
    assert forecast(profile, "ddp", 64, IDEAL, micro_batches=8).efficiency == pytest.approx(1)
    slow = Cluster(bandwidth=2 * PARAMETERS * 10 / 4 * 3 / 50)  # the all-reduce over 4 devices takes 50 s, 30 too many
    prediction = forecast(profile, "ddp", 4, slow, micro_batches=8)
    assert 8 / prediction.images_per_second == pytest.approx(2 * 30 + 30)
    assert prediction.all_reduce == (2 * 3 * PARAMETERS * 10 // 4,)


def test_a_slow_link_slows_every_pipeline() -> None:
    profile = equal_units(4)
    slow = Cluster(bandwidth=STREAMS / 10, latency=1.0)
    for method in METHODS[:-1]:
        assert (
            forecast(profile, method, 4, slow).images_per_second < forecast(profile, method, 4, IDEAL).images_per_second
        )
    assert 1 / forecast(profile, "petra", 4, slow).images_per_second == pytest.approx(
        21
    )  # a message down: 2 s of 10, + 1


def test_what_crosses_a_link() -> None:
    profile = equal_units(4)
    assert forecast(profile, "petra", 4, IDEAL).links == (Link(STREAMS, 2 * STREAMS),) * 3
    for method in ("dsp", "delayed", "1f1b", "gpipe"):
        assert forecast(profile, method, 4, IDEAL).links == (Link(STREAMS, STREAMS),) * 3
    assert forecast(profile, "ddp", 4, IDEAL).links == ()


def test_delays_are_in_updates() -> None:
    assert forecast(equal_units(4), "petra", 4, IDEAL, micro_batches=1).delay == (6, 4, 2, 0)
    assert forecast(equal_units(4), "petra", 4, IDEAL, micro_batches=4).delay == (1.5, 1, 0.5, 0)
    two = forecast(equal_units(4), "petra", 8, IDEAL, micro_batches=4, factorisation=(2, 4))
    assert two.delay == (3, 2, 1, 0), "two replicas share the micro-batches of an update"
    assert forecast(equal_units(4), "1f1b", 4, IDEAL).delay == (0, 0, 0, 0)


def test_what_each_method_keeps() -> None:
    profile = equal_units(4)
    found = {method: forecast(profile, method, 4, IDEAL, micro_batches=8).memory for method in METHODS}
    assert [m.inputs for m in found["petra"]] == [0, 0, 0, 0]
    assert [m.inputs for m in found["dsp"][:3]] == [7 * STREAMS, 5 * STREAMS, 3 * STREAMS]
    assert [m.graphs - WORKING for m in found["delayed"]] == [n * GRAPH for n in (6, 4, 2, 0)]
    assert [m.versions for m in found["delayed"]] == [2 * PARAMETERS, 2 * PARAMETERS, 2 * PARAMETERS, 0]
    assert [m.graphs - WORKING for m in found["1f1b"]] == [3 * GRAPH, 2 * GRAPH, GRAPH, 0]
    assert [m.graphs - WORKING for m in found["gpipe"]] == [7 * GRAPH] * 4
    assert [m.inputs for m in found["1f1b+checkpoint"]] == [n * STREAMS // 2 for n in (3, 2, 1, 0)]
    assert found["ddp"][0].parameters == found["ddp"][0].optimizer == 4 * PARAMETERS


def test_more_devices_than_units_are_used_by_replicas_of_pipelines() -> None:
    prediction = forecast(equal_units(6), "petra", 16, IDEAL, micro_batches=8)
    assert prediction.replicas * prediction.stages <= 16
    assert prediction.stages <= 6
    others = [
        forecast(equal_units(6), "petra", 16, IDEAL, micro_batches=8, factorisation=(16 // p, p)).images_per_second
        for p in range(2, 7)
    ]
    assert prediction.images_per_second == max(others)


def test_what_the_memory_rejects_is_said_with_the_reason_and_another_factorisation_is_taken() -> None:
    tight = Cluster(memory=4 * GRAPH)
    reason = forecast(equal_units(4), "gpipe", 4, tight).rejected
    assert reason == "stage 1 needs 51.2 kB of 20 kB, 41 kB of them graphs"
    assert forecast(equal_units(4), "petra", 4, tight).rejected is None
    unlimited = forecast(equal_units(6), "1f1b", 16, IDEAL)
    limit = Cluster(memory=max(m.total for m in unlimited.memory) - 1)
    limited = forecast(equal_units(6), "1f1b", 16, limit)
    assert limited.rejected is not None or limited.stages != unlimited.stages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("zero", 4), "method is one of"), (("petra", 0), "at least 1")],
)
def test_what_cannot_be_predicted_is_refused(arguments: tuple[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forecast(equal_units(4), *arguments, IDEAL)
    with pytest.raises(ValueError, match="fit neither"):
        forecast(equal_units(4), "petra", 4, IDEAL, factorisation=(2, 4))
    with pytest.raises(ValueError, match=r"split=\[1, 2\] must be 2 positive numbers that add up to 4 units"):
        forecast(equal_units(4), "petra", 2, IDEAL, split=[1, 2])


def test_a_given_split_is_predicted() -> None:
    prediction = forecast(equal_units(4), "delayed", 2, IDEAL, split=[1, 3])
    assert prediction.split == (1, 3)
    assert prediction.images_per_second == pytest.approx(1 / 9)
