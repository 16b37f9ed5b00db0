"""Exact inversion at every g = 2**-m: what g drops of a stream is kept, and what is recomputed is looked at."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.reversible import CoupledUnit, Streams, StreamType, Unit, backpropagate
from petra_zoo.reversible.checksum import checksum
from petra_zoo.reversible.remainder import dropped_bits, pack_bits, unpack_bits
from petra_zoo.reversible.saturation import NotRecomputedError, Ranges, Saturation
from tests.reversible.blocks import Coupling, gradients, parameters_of, run_plainly, worst

GRID = 2.0**-12
FLOATS = StreamType(GRID)


def make_units(
    depth: int, bits: int, streams: StreamType = FLOATS, *, starts: bool = False, dtype: torch.dtype = torch.float32
) -> list[CoupledUnit]:
    """Blocks on tokens behind an activation whose values lie on no grid."""
    torch.manual_seed(0)
    units = []
    for i in range(depth):
        f = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8)).to(dtype)
        units.append(
            CoupledUnit(
                f"block{i}",
                f,
                branch=f,
                activate=nn.SiLU(),
                coupling=Coupling(2.0**-bits),
                starts=starts and i == 0,
                streams=streams,
                gain=Coupling(1.0 + 2.0**-bits),
            )
        )
    return units


def entering(units: list[CoupledUnit], count: int = 2, dtype: torch.dtype = torch.float32) -> Streams:
    torch.manual_seed(1)
    streams = units[0]._streams_type()
    return tuple(streams.snap(torch.randn(3, 5, 8, dtype=dtype)) for _ in range(count))


def there_and_back(units: list[CoupledUnit], streams: Streams) -> Streams:
    """Through all units and their inverses, with the numbers that dropout drew."""
    residues, states = [], []
    for unit in units:
        states.append(torch.get_rng_state())
        with torch.no_grad():
            streams, residue = unit.evaluate(*streams)
        residues.append(residue)
    for unit in reversed(units):
        torch.set_rng_state(states.pop())
        gradients = tuple(torch.ones(x.shape, dtype=x.dtype) for x in streams)
        streams = unit.reverse(streams, gradients, list(unit.parameters()), residues.pop()).inputs
    return streams


def same_bits(xs: Streams, ys: Streams) -> bool:
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(xs, ys, strict=True))


@pytest.mark.parametrize("bits", [0, 1, 3, 8])
@pytest.mark.parametrize("streams", [FLOATS, StreamType(kind="fixed16", fixed=2.0**-10)], ids=["float32", "fixed16"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_48_units_are_inverted_to_the_bit(bits: int, streams: StreamType, autocast: bool) -> None:
    units = make_units(48, bits, streams)
    x = entering(units)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        assert same_bits(there_and_back(units, x), x)


@pytest.mark.parametrize("bits", [0, 1, 3, 8])
def test_float64_streams_are_inverted_to_the_bit(bits: int) -> None:
    units = make_units(24, bits, StreamType(2.0**-30), dtype=torch.float64)
    x = entering(units, dtype=torch.float64)
    assert same_bits(there_and_back(units, x), x)


@pytest.mark.parametrize("bits", [0, 1, 4])
def test_gradients_are_those_of_autograd(bits: int) -> None:
    units = make_units(6, bits, StreamType(2.0**-30), starts=True, dtype=torch.float64)
    (x,) = entering(units, 1, torch.float64)
    wanted = [x.requires_grad_(), *parameters_of(units)]
    torch.manual_seed(2)
    of_plain, plain = gradients(lambda: run_plainly(units, (x,)), wanted)
    torch.manual_seed(2)
    of_reversible, reversible = gradients(lambda: backpropagate(units, (x,)), wanted)
    assert all(map(torch.equal, of_plain, of_reversible))
    assert worst(reversible, plain) < 1e-13


@settings(max_examples=50, deadline=None)
@given(bits=st.integers(1, 8), values=st.lists(st.integers(0, 255), max_size=70))
def test_packed_bits_come_back(bits: int, values: list[int]) -> None:
    low = torch.tensor(values, dtype=torch.uint8) & (2**bits - 1)
    assert torch.equal(unpack_bits(pack_bits(low, bits), bits, low.shape), low)


@pytest.mark.parametrize(("bits", "kept"), [(0, 0), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8)])
def test_a_unit_keeps_the_bits_that_its_coupling_drops(bits: int, kept: int) -> None:
    (unit,) = make_units(1, bits)
    x = entering([unit])
    remainder = [r for r in unit.evaluate(*x).residue if r.dtype == torch.uint8]
    assert sum(r.nbytes for r in remainder) == x[0].numel() * kept // 8


def test_the_powers_of_two_are_couplings_that_drop_bits() -> None:
    assert [dropped_bits(n / 256) for n in (256, 128, 1, 255, 0)] == [0, 1, 8, None, None]


@pytest.mark.parametrize("streams", [FLOATS, StreamType(kind="fixed16")])
@pytest.mark.parametrize(("g", "nearest"), [(0.3, "0.25"), (0.8, "1"), (0.0039, "0.00390625")])
def test_another_coupling_is_refused_with_the_nearest(streams: StreamType, g: float, nearest: str) -> None:
    with pytest.raises(UserError, match=rf"not {g:g}: the nearest is {nearest}$"):
        streams.now(lambda: g, nn.Linear(2, 2))


def test_a_residue_that_is_missing_is_an_error() -> None:
    (unit,) = make_units(1, 1)
    outputs = unit(*entering([unit]))
    with pytest.raises(RuntimeError, match=r"block0 is exact at coupling 0\.5 with the residue"):
        unit.reverse(outputs, (None, None), [])


@pytest.mark.parametrize("streams", [FLOATS, StreamType(kind="fixed16")])
def test_streams_beyond_the_range_are_refused(streams: StreamType) -> None:
    (unit,) = make_units(1, 1, streams)
    x = entering([unit])
    with torch.no_grad():
        unit.block[-1].weight.mul_(1e6)
    with pytest.raises(UserError, match=r"exact inversion needs \|stream\| <"):
        unit.evaluate(*x)


# -- recomputed to the bit --------------------------------------------------------------------------------------------


class FlipsOneBit(nn.Module):
    """A branch whose second evaluation differs by the lowest bit of one element."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.calls = 0

    def forward(self, h: Tensor) -> Tensor:
        f: Tensor = self.branch(h)
        self.calls += 1
        if self.calls == 2:
            bits = torch.zeros(f.numel(), dtype={2: torch.int16, 4: torch.int32}[f.element_size()])
            bits[7] = 1
            flipped = (f.detach().view(bits.dtype) ^ bits.view(f.shape)).view(f.dtype)
            f = f + (flipped - f.detach())
        return f


@contextmanager
def read_as_on_a_gpu(patch: pytest.MonkeyPatch) -> Iterator[None]:
    with patch.context() as context:
        context.setattr(Saturation, "_reads_at_once", lambda self, x: False)
        yield


def backward_through(units: list[CoupledUnit]) -> None:
    x = tuple(s.requires_grad_() for s in entering(units))
    sum(y.sum() for y in backpropagate(units, x)).backward()


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("bits", [0, 3])
@pytest.mark.parametrize("on_a_gpu", [False, True], ids=["cpu", "as on a GPU"])
def test_one_flipped_bit_is_noticed(autocast: bool, bits: int, on_a_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    units = make_units(6, bits)
    units[3].branch = FlipsOneBit(units[3].branch)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        with read_as_on_a_gpu(monkeypatch) if on_a_gpu else nullcontext():
            with pytest.raises(NotRecomputedError, match="the branch of block3 did not give"):
                backward_through(units)


def test_recomputations_are_read_once_for_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    look = Saturation.check
    monkeypatch.setattr(Saturation, "check", lambda self: (seen.append(1), look(self))[1])
    with read_as_on_a_gpu(monkeypatch):
        backward_through(make_units(6, 2))
    assert len(seen) == 1


def test_an_engine_that_reads_by_itself_is_left_to_it() -> None:
    streams = StreamType(GRID)
    units = make_units(4, 1, streams)
    units[2].branch = FlipsOneBit(units[2].branch)
    notes = Ranges()
    with streams.saturation.into(notes):
        backward_through(units)
    assert next(name for name, x in notes.differs.items() if not x.isfinite()) == "block2"
    streams.saturation.check()  # nothing of its own


def test_a_weight_written_through_data_is_noticed() -> None:
    units = make_units(3, 1)
    x = tuple(s.requires_grad_() for s in entering(units))
    total = sum(y.sum() for y in backpropagate(units, x))
    units[1].block[-1].weight.data[0, 0] += 1.0
    with pytest.raises(NotRecomputedError, match="block1"):
        total.backward()


def test_nothing_is_compared_where_parameters_are_to_change() -> None:
    (unit,) = make_units(1, 0)
    unit.same_parameters = False
    assert unit.evaluate(*entering([unit])).residue == ()


def test_a_unit_without_the_promise_has_no_checksum() -> None:
    for streams in (StreamType(), StreamType(kind="fixed16")):
        (unit,) = make_units(1, 0, streams)
        assert unit.evaluate(*entering([unit])).residue == ()


@given(bit=st.integers(0, 31), place=st.integers(0, 23))
def test_a_checksum_tells_of_any_bit_in_any_order(bit: int, place: int) -> None:
    x = torch.randn(2, 3, 4)
    y = x.clone()
    y.view(torch.int32).view(-1)[place] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
    assert checksum(x) != checksum(y)
    assert checksum(x) == checksum(x.transpose(0, 2).contiguous())


def test_units_on_a_grid_list_what_they_need() -> None:
    of = {bits: make_units(2, bits, starts=True) for bits in (0, 1)}
    assert [unit.needs_same_parameters for unit in of[0] + of[1]] == [False, False, False, True]
    plain: list[Unit] = list(make_units(2, 1, StreamType()))
    assert not any(unit.needs_same_parameters for unit in plain)
