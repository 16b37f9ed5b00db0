"""Links between processes, over torch.distributed's point-to-point.

Receives are posted a tick before their message is used, into memory that is allocated once: gloo is a rendezvous, its
sends end only when the other side has posted the receive. A message is sent from memory of its own, and nobody waits
for it to be taken until the next one goes the same way: it has a whole tick. A header, which the CPU reads, carries its
number and its size: a smaller last batch needs no memory of its own, and a rank that is gone is noticed there.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from petra_zoo.petra.channels import BODY, HEADER, LAYOUT, Channel
from petra_zoo.petra.links import Direction, LinkError, Links, Wire
from petra_zoo.petra.messages import Down, Up
from petra_zoo.petra.parcels import Body, Form, Parcel
from petra_zoo.petra.slots import Slots
from petra_zoo.petra.world import START_TIMEOUT, World

LAYOUT_BYTES = 2048
# To receive into one while the other one is used. To send from one: what was sent there before has had a tick to go.
_RECEIVED, _SENT = 2, 1


def make_links(
    world: World, owned: range, wire: Wire | None = None, evaluation: bool = False, running: bool = False
) -> Links:
    """A rank's links: queues where it is alone; the arguments are those of `ProcessLinks`."""
    return Links(wire or world.wire) if world.size == 1 else ProcessLinks(world, owned, wire, evaluation, running)


class ProcessLinks(Links):
    """Links of a rank's stages: queues inside it, channels to the ranks beside it.

    Args:
        world: this rank's place; its wire's timeout holds once the first tick is over.
        owned: its stages.
        wire: types of messages; default: the world's.
        evaluation: whether they take the evaluation's channels, where nothing of the training is under way.
        running: whether the first tick is over: the timeout holds from the first message on.
    """

    def __init__(
        self, world: World, owned: range, wire: Wire | None = None, evaluation: bool = False, running: bool = False
    ) -> None:
        super().__init__(wire or world.wire)
        self.world, self.owned = world, owned
        ways = world.evaluation_channels if evaluation else world.channels
        self._from_below = _Inlet(world, ways.from_below, "up", owned[0]) if ways.from_below else None
        self._from_above = _Inlet(world, ways.from_above, "down", owned[-1]) if ways.from_above else None
        self._to_above = _Outlet(world, ways.to_above, "up", owned[-1] + 1) if ways.to_above else None
        self._to_below = _Outlet(world, ways.to_below, "down", owned[0] - 1) if ways.to_below else None
        ends = (self._from_below, self._from_above, self._to_above, self._to_below)
        self._ends = [end for end in ends if end]
        for end in self._ends:
            end.running = running
        self._gone_up: Up | None = None  # sent to another rank in the last tick: the sender saves it
        self._gone_down: Down | None = None

    def expect(self, tick: int, ups: Iterable[int], downs: Iterable[int]) -> None:
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


class _End:
    """One end of a link in one direction.

    Attributes:
        count: slots for its messages.
    """

    count: int

    def __init__(self, world: World, channel: Channel, direction: Direction, stage: int) -> None:
        self.channel, self.direction, self.stage = channel, direction, stage
        self.here, self.device = world.peers[world.rank], world.device
        self.timeout = timedelta(seconds=world.wire.timeout)
        # Where messages lie while they travel: gloo reads and writes the CPU's memory only.
        self.staged = world.device.type == "cuda" and not world.nccl
        self.laid_out: tuple[Body, Slots] | None = None  # when the first message is known
        self.tick = 0
        self.running = False  # whether a message has passed
        self.images = 0  # of a full micro-batch, where the first to travel may be smaller

    def adopt(self, parcel: Parcel) -> None:
        """Takes the layout of a message that was saved, at both ends: neither waits for the other to say it.

        Else, with first messages on their way up and down in one tick, each rank would wait for its own to be taken.
        """
        self.lay_out(parcel.body(self.images))

    def lay_out(self, body: Body) -> tuple[Body, Slots]:
        """Takes the layout of all messages, and memory for those under way."""
        self.laid_out = body, Slots(body.nbytes, self.count, self.device, self.staged)
        return self.laid_out

    def begin(self, operation: Callable[[Tensor, int], Work | None], x: Tensor, part: int) -> Work | None:
        """Begins a send or a receive.

        Raises:
            LinkError: the other rank has gone.
        """
        try:
            return operation(x, part)
        except RuntimeError as error:
            raise LinkError(f"{self}: that rank has gone ({str(error).strip().splitlines()[0][:160]})") from error

    def wait(self, work: Work | None, part: int) -> None:
        """Waits for a send or a receive.

        Raises:
            LinkError: it did not end in time, or the other rank has gone.
        """
        limit = self.timeout if self.running else max(self.timeout, START_TIMEOUT)
        wait_for(work, limit if part != BODY or self.channel.timed else None, str(self))


def wait_for(work: Work | None, timeout: timedelta | None, what: str) -> None:
    """Waits for a send or a receive.

    Args:
        work: that.
        timeout: None: lets the device's work wait, and not the host (NCCL).
        what: it was, in words.

    Raises:
        LinkError: it did not end in time, or the other rank has gone; says what it was.
    """
    assert work is not None, "only members of a group send and receive in it"
    try:
        work.wait(timeout) if timeout else work.wait()
    except RuntimeError as error:
        reason = str(error)
        how = (
            f"nothing within {timeout.total_seconds():g} s"
            if timeout and "imed out" in reason
            else "that rank has gone"
        )
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
    wait_for(dist.all_reduce(x, operation, group=group, async_op=True), None if x.is_cuda else timeout, what)


@dataclass
class _Message:
    """A message under way, and the memory that it is read from or written to.

    Attributes:
        tick: in which it will be used; of one that is sent, how many came before it.
        works: by part.
        layout, header, slot: the parts.
    """

    tick: int
    works: list[tuple[int, Work | None]] = field(default_factory=list)
    header: Tensor = field(default_factory=lambda: torch.empty(2, dtype=torch.int64))
    layout: Tensor | None = None
    slot: Tensor | None = None


class _Outlet(_End):
    """The sending end. What it sends is copied: the stage may write over its tensors."""

    count = _SENT

    def __init__(self, world: World, channel: Channel, direction: Direction, stage: int) -> None:
        super().__init__(world, channel, direction, stage)
        self._flying: deque[_Message] = deque()
        self._sent = 0

    def __str__(self) -> str:
        return (
            f"stage {self.stage} (rank {self.channel.peer}) did not take the {self.direction} message of tick "
            f"{self.tick} from rank {self.here}"
        )

    def send(self, number: int, parcel: Parcel) -> None:
        """Begins to send a message."""
        message = _Message(self._sent)
        if self.laid_out is None:
            body, _ = self.lay_out(parcel.body(self.images))
            text = json.dumps(body.as_json()).encode().ljust(LAYOUT_BYTES)
            assert len(text) == LAYOUT_BYTES
            message.layout = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            self._isend(message, message.layout, LAYOUT)
        assert self.laid_out is not None
        body, slots = self.laid_out
        size = next(len(x) for x in parcel.tensors if x is not None)
        if size > body.images:
            raise ValueError(
                f"a micro-batch of {size} images follows a first one of {body.images}: feed full ones first"
            )
        message.header = torch.tensor([number, size])
        self._isend(message, message.header, HEADER)
        self.finish()
        message.slot = slots.take()
        places = body.views(message.slot, size)
        assert [x is None for x in parcel.tensors] == [x is None for x in places], "a message changed its form"
        for place, x in zip(places, parcel.tensors, strict=True):
            if place is not None and x is not None:
                place.copy_(x)
        self._isend(message, message.slot, BODY)
        self._flying.append(message)
        self._sent += 1

    def finish(self) -> None:
        """Waits until all messages have been taken."""
        while self._flying:
            message = self._flying.popleft()
            self.tick = message.tick
            for part, work in message.works:
                self.wait(work, part)
            self.running = True

    def _isend(self, message: _Message, x: Tensor, part: int) -> None:
        message.works.append((part, self.begin(self.channel.isend, x, part)))


class _Inlet(_End):
    """The receiving end."""

    count = _RECEIVED

    def __init__(self, world: World, channel: Channel, direction: Direction, stage: int) -> None:
        super().__init__(world, channel, direction, stage)
        self._posted: deque[_Message] = deque()
        self._used: Tensor | None = None  # the slot of the last message
        self._layout = torch.empty(LAYOUT_BYTES, dtype=torch.uint8)
        # Its receive; never posted where nothing comes, or it would take another link's.
        self._first: Work | None = None

    def __str__(self) -> str:
        return (
            f"stage {self.stage} (rank {self.here}) waits for the {self.direction} message of tick {self.tick} from "
            f"rank {self.channel.peer}"
        )

    def post(self, tick: int) -> None:
        """Posts the receive of the message that will be used in a tick."""
        if self._first is None and self.laid_out is None:
            self._first = self.begin(self.channel.irecv, self._layout, LAYOUT)
        message = _Message(tick)
        self._irecv(message, message.header, HEADER)
        self._posted.append(message)
        if self.laid_out is not None:
            self._post_body(message, self.laid_out[1])

    def receive(self, keep: bool) -> tuple[int, list[Tensor | None], int]:
        """Number, tensors and how many of them are streams.

        The tensors are valid for this tick, then their slot is received into again; `keep` copies them. A rank of
        several stages keeps them all: a block hands one of its streams on as it is, to a stage that looks at it later.
        """
        self.tick = self._posted[0].tick
        if self.laid_out is None:  # the first message: only now it is known how large they are
            self.wait(self._first, LAYOUT)
            _, slots = self.lay_out(Body.from_json(json.loads(bytes(self._layout.numpy()).decode())))
            for message in self._posted:
                self._post_body(message, slots)
        assert self.laid_out is not None
        body, slots = self.laid_out
        if self._used is not None and not self.staged:
            slots.has_been_read(self._used)
        message = self._posted.popleft()
        for part, work in message.works:
            self.wait(work, part)
        self.running = True
        number, size = message.header.tolist()
        self._used = message.slot
        assert message.slot is not None
        tensors = [
            None if form is None or x is None else self._arrived(x, form, slots, keep)
            for form, x in zip(body.forms, body.views(message.slot, size), strict=True)
        ]
        if self.staged:
            slots.has_been_read(message.slot)
        return number, tensors, body.streams

    def _arrived(self, x: Tensor, form: Form, slots: Slots, keep: bool) -> Tensor:
        x = slots.on_device(x.data)  # with a version counter of its own: writing over one does not change the others
        return (x.clone() if keep and not self.staged else x).to(form.dtype)

    def _post_body(self, message: _Message, slots: Slots) -> None:
        message.slot = slots.take()
        with slots.receiving(message.slot):
            self._irecv(message, message.slot, BODY)

    def _irecv(self, message: _Message, x: Tensor, part: int) -> None:
        message.works.append((part, self.begin(self.channel.irecv, x, part)))
