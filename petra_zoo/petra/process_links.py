"""Links between processes, over torch.distributed's point-to-point.

Receives are posted a tick before their message is used, into buffers that are allocated once: gloo is a rendezvous,
its sends end only when the other side has posted the receive. Sends run on while the rank computes. A header in front
of every message carries its number and its size, so that a smaller last batch needs no buffers of its own.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from petra_zoo.petra.links import Direction, LinkError, Links, Wire
from petra_zoo.petra.messages import Down, Up
from petra_zoo.petra.parcels import Form, Parcel
from petra_zoo.petra.world import START_TIMEOUT, World

LAYOUT_BYTES = 2048
EVALUATION_TAG = 64  # of an evaluation's links, apart from the training's
_TAGS = {"up": 0, "down": 16}


def make_links(world: World, owned: range, wire: Wire | None = None, tag: int = 0, running: bool = False) -> Links:
    """A rank's links: queues where it is alone; the arguments are those of `ProcessLinks`."""
    return Links(wire or world.wire) if world.size == 1 else ProcessLinks(world, owned, wire, tag, running)


class ProcessLinks(Links):
    """Links of a rank's stages: queues inside it, torch.distributed to the ranks beside it.

    Args:
        world: this rank's place; its wire's timeout holds once the first tick is over.
        owned: its stages.
        wire: types of messages; default: the world's.
        tag: keeps these messages apart from those of other `ProcessLinks` (of an evaluation).
        running: whether the first tick is over: the timeout holds from the first message on.
    """

    def __init__(
        self, world: World, owned: range, wire: Wire | None = None, tag: int = 0, running: bool = False
    ) -> None:
        super().__init__(wire or world.wire)
        self.world, self.owned = world, owned
        below, above = world.rank - 1, world.rank + 1
        self._from_below = _Inlet(world, below, "up", owned[0], tag) if not world.first else None
        self._from_above = _Inlet(world, above, "down", owned[-1], tag) if not world.last else None
        self._to_above = _Outlet(world, above, "up", owned[-1] + 1, tag) if not world.last else None
        self._to_below = _Outlet(world, below, "down", owned[0] - 1, tag) if not world.first else None
        ends = (self._from_below, self._from_above, self._to_above, self._to_below)
        self._ends = [end for end in ends if end]
        for end in self._ends:
            end.running = running
        self._gone_up: Up | None = None  # sent to another rank in the last tick: the sender saves it
        self._gone_down: Down | None = None

    def expect(self, tick: int, ups: Iterable[int], downs: Iterable[int]) -> None:
        self.finish()  # before the buffers that were sent from are received into
        self._gone_up = self._gone_down = None
        if any(end.running for end in self._ends):  # the other ranks have begun as well
            for end in self._ends:
                end.running = True
        if self._from_below and self.owned[0] in ups:
            self._from_below.post(tick)
        if self._from_above and self.owned[-1] in downs:
            self._from_above.post(tick)

    def send_up(self, to: int, up: Up) -> None:
        if to in self.owned or not self._to_above:
            return super().send_up(to, up)
        self._gone_up = up
        self._to_above.send(up.micro_batch, Parcel.of(up, self.wire))

    def send_down(self, to: int, down: Down) -> None:
        if to in self.owned or not self._to_below:
            return super().send_down(to, down)
        self._gone_down = down
        self._to_below.send(down.micro_batch, Parcel.of(down, self.wire))

    def receive_up(self, stage: int, keep: bool = False) -> Up:
        if stage != self.owned[0] or not self._from_below or self.ups.get(stage):  # some came back out of a state
            return super().receive_up(stage, keep)
        number, tensors, _ = self._from_below.receive(keep or len(self.owned) > 1)
        *streams, labels = _present(tensors)
        return Up(number, tuple(streams), labels.clone())  # labels are handed to the user

    def receive_down(self, stage: int) -> Down:
        if stage != self.owned[-1] or not self._from_above or self.downs.get(stage):
            return super().receive_down(stage)
        number, tensors, streams = self._from_above.receive(len(self.owned) > 1)
        return Down(number, _present(tensors[:streams]), tuple(tensors[streams:]))  # only gradients may be missing

    def sent_by(self, stage: int) -> tuple[list[Up], list[Down]]:
        ups, downs = super().sent_by(stage)
        if stage == self.owned[-1] and (up := self._gone_up):
            ups = [self.wire.arriving(up)]
        if stage == self.owned[0] and (down := self._gone_down):
            downs = [self.wire.arriving(down)]
        return ups, downs

    def resend_up(self, to: int, up: Up) -> None:
        if to == self.owned[0] and self._from_below:
            self._from_below.adopt(Parcel.of(up, self.wire))
        if to in self.owned:
            super().resend_up(to, up)
        elif to == self.owned[-1] + 1 and self._to_above:
            self._gone_up = up  # the rank above has read it for itself; it is this one's to save again
            self._to_above.adopt(Parcel.of(up, self.wire))

    def resend_down(self, to: int, down: Down) -> None:
        if to == self.owned[-1] and self._from_above:
            self._from_above.adopt(Parcel.of(down, self.wire))
        if to in self.owned:
            super().resend_down(to, down)
        elif to == self.owned[0] - 1 and self._to_below:
            self._gone_down = down
            self._to_below.adopt(Parcel.of(down, self.wire))

    def begin_with(self, images: int) -> None:
        for end in self._ends:
            end.images = images

    def finish(self) -> None:
        for outlet in (self._to_above, self._to_below):
            if outlet:
                outlet.finish()


def _present(tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    found = tuple(x for x in tensors if x is not None)
    assert len(found) == len(tensors), "a message without one of its streams"
    return found


class _Begin(Protocol):
    """torch.distributed's isend or irecv."""

    def __call__(self, tensor: Tensor, peer: int, group: ProcessGroup | None, tag: int, /) -> Work | None: ...


class _End:
    """One end of a link in one direction."""

    def __init__(self, world: World, peer: int, direction: Direction, stage: int, tag: int) -> None:
        self.world, self.peer, self.direction, self.stage = world, peer, direction, stage
        self.group = world.up if direction == "up" else world.down
        self.address = world.peers[peer]
        self.tag = tag + _TAGS[direction]
        self.timeout = timedelta(seconds=world.wire.timeout)
        # Where messages lie while they travel: gloo reads and writes the CPU's memory only.
        self.staged = world.device.type == "cuda" and not world.nccl
        self.place = torch.device("cpu") if self.staged else world.device
        self.streams = 0
        self.layouts: list[Form | None] | None = None
        self.tick = 0
        self.running = False  # whether a message has passed
        self.images = 0  # of a full micro-batch, where the first to travel may be smaller

    def present(self) -> list[Form]:
        """Layouts of the tensors that a message has."""
        return [layout for layout in self.layouts or [] if layout]

    def adopt(self, parcel: Parcel) -> None:
        """Takes the layouts of a message that was saved, at both ends: neither waits for the other to say them.

        Else, with first messages on their way up and down in one tick, each rank would wait for its own to be taken.
        """
        self.layouts, self.streams = parcel.layouts(self.images), parcel.streams

    def begin(self, operation: _Begin, x: Tensor, part: int) -> Work | None:
        """Begins a send or a receive.

        Raises:
            LinkError: the other rank has gone.
        """
        try:
            return operation(x, self.address, self.group, self.tag + part)
        except RuntimeError as error:
            raise LinkError(f"{self}: that rank has gone ({str(error).strip().splitlines()[0][:160]})") from error

    def wait(self, work: Work | None) -> None:
        """Waits for a send or a receive.

        Raises:
            LinkError: it did not end in time, or the other rank has gone.
        """
        wait_for(work, self.timeout if self.running else max(self.timeout, START_TIMEOUT), str(self))


def wait_for(work: Work | None, timeout: timedelta, what: str) -> None:
    """Waits for a send or a receive.

    Raises:
        LinkError: it did not end in time, or the other rank has gone; says what it was.
    """
    assert work is not None, "only members of a group send and receive in it"
    try:
        work.wait(timeout)
    except RuntimeError as error:
        reason = str(error)
        how = f"nothing within {timeout.total_seconds():g} s" if "imed out" in reason else "that rank has gone"
        raise LinkError(f"{what}: {how} ({reason.strip().splitlines()[0][:160]})") from error


def reduce_within(
    timeout: timedelta,
    x: Tensor,
    group: ProcessGroup,
    what: str,
    operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
) -> None:
    """Reduces a tensor over a group, in place.

    Raises:
        LinkError: a process has gone, or is silent for longer than the timeout (where NCCL does not watch over it).
    """
    if x.is_cuda:
        dist.all_reduce(x, operation, group=group)
    else:
        wait_for(dist.all_reduce(x, operation, group=group, async_op=True), timeout, what)


class _Outlet(_End):
    """The sending end."""

    def __init__(self, world: World, peer: int, direction: Direction, stage: int, tag: int) -> None:
        super().__init__(world, peer, direction, stage, tag)
        self._flying: list[tuple[Work | None, Tensor]] = []  # sends and the memory they read from

    def __str__(self) -> str:
        return (
            f"stage {self.stage} (rank {self.address}) did not take the {self.direction} message of tick {self.tick} "
            f"from rank {self.world.peers[self.world.rank]}"
        )

    def send(self, number: int, parcel: Parcel) -> None:
        """Begins to send a message."""
        tensors = parcel.tensors
        size = next(len(x) for x in tensors if x is not None)
        if self.layouts is None:
            self.layouts = parcel.layouts(self.images)
            rows = [layout and layout.as_json() for layout in self.layouts]
            text = json.dumps([parcel.streams, rows]).encode().ljust(LAYOUT_BYTES)
            assert len(text) == LAYOUT_BYTES
            self._isend(torch.frombuffer(bytearray(text), dtype=torch.uint8), 0)
        assert [x is None for x in tensors] == [layout is None for layout in self.layouts], "a message changed its form"
        capacity = self.present()[0].shape[0]
        if size > capacity:
            raise ValueError(f"a micro-batch of {size} images follows a first one of {capacity}: feed full ones first")
        self._isend(torch.tensor([number, size]), 1)
        for i, (x, layout) in enumerate((x, y) for x, y in zip(tensors, self.layouts, strict=True) if x is not None):
            assert layout is not None
            dense = x.permute(layout.order)
            if size < capacity or self.staged:
                padded = layout.buffer(self.place, pin=self.staged)
                padded[:size].copy_(dense)
                dense = padded
            self._isend(dense.contiguous(), 2 + i)
        self.tick += 1

    def finish(self) -> None:
        """Waits until all messages have been taken."""
        for work, _ in self._flying:
            self.wait(work)
        self.running |= bool(self._flying)
        self._flying.clear()

    def _isend(self, x: Tensor, part: int) -> None:
        self._flying.append((self.begin(dist.isend, x, part), x))


@dataclass
class _Posted:
    """A message whose receive has been posted."""

    tick: int
    header: Tensor
    works: list[Work | None]
    slot: list[Tensor] = field(default_factory=list)


class _Inlet(_End):
    """The receiving end, with two sets of buffers: one is received into while the other one is used."""

    def __init__(self, world: World, peer: int, direction: Direction, stage: int, tag: int) -> None:
        super().__init__(world, peer, direction, stage, tag)
        self._slots: list[list[Tensor]] = []
        self._posted: deque[_Posted] = deque()
        self._layout = torch.empty(LAYOUT_BYTES, dtype=torch.uint8)
        # Its receive; never posted where nothing comes, or it would take another link's.
        self._first: Work | None = None

    def __str__(self) -> str:
        return (
            f"stage {self.stage} (rank {self.world.peers[self.world.rank]}) waits for the {self.direction} message of "
            f"tick {self.tick} from rank {self.address}"
        )

    def post(self, tick: int) -> None:
        """Posts the receive of the message that will be used in a tick."""
        if self._first is None and self.layouts is None:
            self._first = self._irecv(self._layout, 0)
        header = torch.empty(2, dtype=torch.int64)
        message = _Posted(tick, header, [self._irecv(header, 1)])
        self._posted.append(message)
        if self.layouts is not None:
            self._post_tensors(message)

    def receive(self, keep: bool) -> tuple[int, list[Tensor | None], int]:
        """Number, tensors and how many of them are streams.

        The tensors are valid for this tick, then their buffer is received into again; `keep` copies them. A rank of
        several stages keeps them all: a block hands one of its streams on as it is, to a stage that looks at it later.
        """
        self.tick = self._posted[0].tick
        if self.layouts is None:  # the first message: only now the buffers' sizes are known
            self.wait(self._first)
            self.streams, rows = json.loads(bytes(self._layout.numpy()).decode())
            self.layouts = [row and Form.from_json(row) for row in rows]
            self._make_slots()
            for message in self._posted:
                self._post_tensors(message)
        message = self._posted.popleft()
        for work in message.works:
            self.wait(work)
        self.running = True
        number, size = (int(x) for x in message.header)
        filled = iter([x.clone() for x in message.slot] if keep else message.slot)
        return number, [None if y is None else self._unpack(y, next(filled), size) for y in self.layouts], self.streams

    def adopt(self, parcel: Parcel) -> None:
        super().adopt(parcel)
        self._make_slots()

    def _make_slots(self) -> None:
        self._slots = [[layout.buffer(self.place, pin=self.staged) for layout in self.present()] for _ in range(2)]

    def _post_tensors(self, message: _Posted) -> None:
        self._slots.reverse()
        message.slot = self._slots[0]
        message.works += [self._irecv(x, 2 + i) for i, x in enumerate(message.slot)]

    def _unpack(self, layout: Form, buffer: Tensor, size: int) -> Tensor:
        x = layout.view(buffer, size)
        if self.staged:
            x = x.to(self.world.device, non_blocking=True)
        return x.to(layout.dtype)

    def _irecv(self, x: Tensor, part: int) -> Work | None:
        return self.begin(dist.irecv, x, part)
