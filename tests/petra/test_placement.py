"""Which GPU a process takes and how messages travel, for what launchers show to their processes."""

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist

from petra_zoo.petra import placement as module
from petra_zoo.petra.placement import Placement, PlacementError, Surroundings, exchange_places
from petra_zoo.petra.world import START_TIMEOUT


def machine(host: str, gpus: int, processes: int, *, own: bool = False, index: int | None = None) -> list[Surroundings]:
    """What the processes of a machine see: all its GPUs, or each its own as number 0."""
    all_of_them = tuple(f"{host}-{i}" for i in range(gpus))
    return [Surroundings(host, "cuda", index, all_of_them[i : i + 1] if own else all_of_them) for i in range(processes)]


@pytest.mark.parametrize(
    ("places", "indices", "nccl"),
    [
        pytest.param(machine("a", 4, 4), (0, 1, 2, 3), True, id="torchrun, a GPU each"),
        pytest.param(machine("a", 4, 2) + machine("b", 4, 2), (0, 1, 0, 1), True, id="two machines"),
        pytest.param(machine("a", 4, 4, own=True), (0, 0, 0, 0), True, id="srun --gpus-per-task=1"),
        pytest.param(machine("a", 2, 2, own=True) + machine("b", 2, 2), (0, 0, 0, 1), True, id="both kinds"),
        pytest.param(machine("a", 4, 3) + machine("b", 1, 1), (0, 1, 2, 0), True, id="unequal machines"),
        pytest.param(machine("a", 1, 1) + machine("b", 4, 4), (0, 0, 1, 2, 3), True, id="unequal, the small one first"),
        pytest.param(machine("a", 1, 2), (0, 0), False, id="one GPU for two"),
        pytest.param(machine("a", 2, 2) + machine("b", 1, 2), (0, 1, 0, 0), False, id="one of two machines is short"),
        pytest.param(machine("a", 1, 2, index=0), (0, 0), False, id="told to share the only one"),
        pytest.param(
            [Surroundings("a", "cuda", i, ("a-0", "a-1")) for i in (1, 0)],
            (1, 0),
            True,
            id="told one by one which to take",
        ),
        pytest.param([Surroundings("a"), Surroundings("a"), Surroundings("b")], (None, None, None), False, id="no GPU"),
    ],
)
def test_all_processes_decide_alike(
    places: Sequence[Surroundings], indices: tuple[int | None, ...], nccl: bool
) -> None:
    found = Placement.of(places)
    assert (found.indices, found.nccl) == (indices, nccl)


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (machine("a", 4, 4, index=0), "device=cuda:0 would put 4 processes of a on one of its 4 GPUs: set device=cuda"),
        (
            [*machine("a", 1, 1), Surroundings("b")],
            r"rank 1 \(b\) computes on cpu, rank 0 \(a\) on cuda: set",
        ),
        ([*machine("a", 1, 1), Surroundings("b", "cuda")], r"rank 1 \(b\) sees no GPU"),
        (machine("a", 2, 1, index=3), r"device=cuda:3: rank 0 \(a\) sees 2, from cuda:0 on"),
    ],
)
def test_what_cannot_be_meant_is_refused(places: Sequence[Surroundings], said: str) -> None:
    with pytest.raises(PlacementError, match=said):
        Placement.of(places)


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (machine("a", 1, 1) + machine("b", 1, 1), "2 processes on 2 machines, a GPU each, messages by NCCL"),
        (machine("a", 1, 2), "by gloo through the host's memory: ranks 0, 1 share a GPU of a, which NCCL refuses"),
        ([Surroundings("a")] * 3, "3 processes on 1 machine, messages by gloo"),
    ],
)
def test_the_transport_is_said_with_its_reason(places: Sequence[Surroundings], said: str) -> None:
    assert said in Placement.of(places).transport


def test_what_one_process_sees_every_other_hears_of() -> None:
    store = dist.HashStore()
    places = machine("a", 2, 2) + machine("b", 1, 1)
    for rank, place in enumerate(places[:2]):
        store.set(f"place {rank}", module.json.dumps(module.asdict(place)))
    assert exchange_places(store, 2, 3, places[2], START_TIMEOUT) == places


def test_a_process_on_the_cpu_asks_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("asked"))
    assert Surroundings.here(torch.device("cpu")).gpus == ()
