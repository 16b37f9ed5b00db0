"""Rings: first in, first out, at addresses that stay."""

import pytest
import torch
from torch import Tensor

from petra_zoo.petra.fifo import Ring, filled
from petra_zoo.petra.ring_places import RingPlaces


def streams(n: int, size: int = 4) -> tuple[Tensor, ...]:
    """Of two types and memory formats, one of them without a batch."""
    x = torch.full((size, 3, 2, 2), float(n)).to(memory_format=torch.channels_last)
    return x, torch.full((6,), n, dtype=torch.uint8)


def test_what_goes_in_comes_out_in_order_and_as_it_was() -> None:
    ring = Ring(3)
    for n in range(7):
        ring.append(streams(n))
        if n >= 2:
            x, y = ring.popleft()
            assert x.stride() == streams(0)[0].stride()
            assert torch.equal(x, streams(n - 2)[0])
            assert torch.equal(y, streams(n - 2)[1])
    assert len(ring) == 2
    assert [int(x[0, 0, 0, 0]) for x, _ in ring] == [5, 6]


def test_what_came_out_is_not_written_over() -> None:
    ring = Ring(1)
    ring.append(streams(1))
    first = ring.popleft()
    ring.append(streams(2))
    assert torch.equal(first[0], streams(1)[0])


def test_a_smaller_micro_batch_takes_part_of_a_slot_and_a_larger_one_moves_the_ring() -> None:
    ring = filled(lambda: Ring(3), [streams(1), streams(2, size=2)])
    assert isinstance(ring, Ring)
    before = [x.data_ptr() for x in ring.buffers]
    ring.append(streams(3, size=6))
    assert [x.data_ptr() for x in ring.buffers] != before
    for n, size in ((1, 4), (2, 2), (3, 6)):
        assert torch.equal(ring.popleft()[0], streams(n, size)[0])


def test_it_does_not_write_over_what_is_still_wanted() -> None:
    ring = filled(lambda: Ring(2), [streams(1), streams(2)])
    with pytest.raises(IndexError, match="2 slots"):
        ring.append(streams(3))


def test_places_on_the_device_move_as_the_ring_does_on_the_host() -> None:
    ring = filled(lambda: Ring(3), [streams(1), streams(2)])
    assert isinstance(ring, Ring)
    places = RingPlaces([ring], torch.device("cpu"))
    places.set()
    for n in range(3, 9):
        with places.used():
            ring.append(streams(n))
            x, y = ring.popleft()
        assert x.stride() == streams(0)[0].stride()
        assert torch.equal(x, streams(n - 2)[0])
        assert torch.equal(y, streams(n - 2)[1])
    assert len(ring) == 2
    assert torch.equal(ring.popleft()[0], streams(7)[0])
