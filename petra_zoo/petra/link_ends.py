"""The two ends of a link between processes, in one direction.

Receives are posted a tick before their message is used, into memory that is allocated once: gloo is a rendezvous, its
sends end only when the other side has posted the receive. A message is sent from memory of its own, and nobody waits
for it to be taken until the next one goes the same way: it has a whole tick. A header, which the CPU reads, carries its
number and its size: a smaller last batch needs no memory of its own, and a rank that is gone is noticed there.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import Work

from petra_zoo.petra.channels import BODY, HEADER, LAYOUT, Channel
from petra_zoo.petra.links import Direction, LinkError
from petra_zoo.petra.parcels import Body, Form, Parcel
from petra_zoo.petra.slots import Slots
from petra_zoo.petra.waiting import OneBehind, recorded_event, wait_for
from petra_zoo.petra.world import START_TIMEOUT, World

Unpacked = tuple[int, list[Tensor | None], int]  # a message: its number, tensors, how many of them are streams

LAYOUT_BYTES = 2048
# To receive into one while the other one is used. To send from one: what was sent there before has had a tick to go.
_RECEIVED, _SENT = 2, 1
_ALIVE = -1  # in the place of a number: no message yet, but the rank waits for data, and is not dead


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
        self.patient = False  # whether the other end may still be about what it does for the first time
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

    @property
    def limit(self) -> timedelta:
        """For how long the other end may be silent now."""
        return self.timeout if self.running and not self.patient else max(self.timeout, START_TIMEOUT)

    def wait(self, work: Work | None, part: int) -> None:
        """Waits for a send or a receive.

        Raises:
            LinkError: it did not end in time, or the other rank has gone.
        """
        wait_for(work, self.limit if part != BODY or self.channel.timed else None, str(self))


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
    header: Tensor | None = None
    layout: Tensor | None = None
    slot: Tensor | None = None


class Outlet(_End):
    """The sending end. What it sends is copied: the stage may write over its tensors."""

    count = _SENT

    def __init__(self, world: World, channel: Channel, direction: Direction, stage: int) -> None:
        super().__init__(world, channel, direction, stage)
        self._flying: deque[_Message] = deque()
        self._sent = 0
        self._last: tuple[int, int, Tensor] | None = None  # number, size and slot of a message that may be saved

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
        body, _ = self.laid_out
        size = parcel.images
        if size > body.images:
            raise ValueError(
                f"a micro-batch of {size} images follows a first one of {body.images}: feed full ones first"
            )
        self._send_header(message, number, size)
        self.finish()
        message.slot = self._fill(number, size, parcel)
        self._isend(message, message.slot, BODY)
        self._flying.append(message)
        self._sent += 1

    def hold(self, number: int, parcel: Parcel) -> None:
        """Takes back what was sent in the tick after which a run was saved: it is this rank's to save again."""
        self.adopt(parcel)
        self._fill(number, parcel.images, parcel)

    def _fill(self, number: int, size: int, parcel: Parcel) -> Tensor:
        """Copies a message into the next slot."""
        assert self.laid_out is not None
        body, slots = self.laid_out
        slot = slots.take()
        places = body.views(slot, size)
        assert [x is None for x in parcel.tensors] == [x is None for x in places], "a message changed its form"
        for place, x in zip(places, parcel.tensors, strict=True):
            if place is not None and x is not None:
                if place.shape != x.shape:
                    raise ValueError(
                        f"a message of shape {list(x.shape)} follows such of {list(place.shape)}: drain() the pipeline "
                        "before images or labels change their form"
                    )
                place.copy_(x)
        self._last = number, size, slot
        return slot

    def next_tick(self) -> None:
        """What was sent before is the other end's from now on."""
        self._last = None

    def look_back(self) -> Unpacked | None:
        """What was sent in this tick, as it arrives: the slot still has it."""
        if self._last is None or self.laid_out is None:
            return None
        (number, size, slot), (body, _) = self._last, self.laid_out
        views = zip(body.forms, body.views(slot, size), strict=True)
        return number, [None if form is None or x is None else x.to(form.dtype) for form, x in views], body.streams

    def say_alive(self) -> None:
        """Tells the other end to wait on; once messages have begun."""
        if self.running:
            message = _Message(self._sent)
            self._send_header(message, _ALIVE, 0)
            self._flying.append(message)

    def finish(self) -> None:
        """Waits until all messages have been taken."""
        while self._flying:
            message = self._flying.popleft()
            self.tick = message.tick
            for part, work in message.works:
                self.wait(work, part)
            self.running = True

    def _send_header(self, message: _Message, number: int, size: int) -> None:
        message.header = torch.tensor([number, size])
        self._isend(message, message.header, HEADER)

    def _isend(self, message: _Message, x: Tensor, part: int) -> None:
        message.works.append((part, self.begin(self.channel.isend, x, part)))


class Inlet(_End):
    """The receiving end.

    Args:
        pass_on: hands on a sign of life to those that wait for this rank.
    """

    count = _RECEIVED

    def __init__(
        self,
        world: World,
        channel: Channel,
        direction: Direction,
        stage: int,
        pass_on: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(world, channel, direction, stage)
        self._pass_on = pass_on
        self._headers: deque[tuple[Tensor, Work | None]] = deque()  # posted; the first is the oldest message's
        self._posted: deque[_Message] = deque()
        self._used: Tensor | None = None  # the slot of the last message
        self._layout = torch.empty(LAYOUT_BYTES, dtype=torch.uint8)
        # Its receive; never posted where nothing comes, or it would take another link's.
        self._first: Work | None = None
        self._behind = OneBehind(recorded_event) if self.device.type == "cuda" and not channel.timed else None

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
        self._post_header()
        self._posted.append(message)
        if self.laid_out is not None:
            self._post_body(message, self.laid_out[1])

    def receive(self, keep: bool) -> Unpacked:
        """The oldest message.

        The tensors are valid for this tick, then their slot is received into again; `keep` copies them. A rank of
        several stages keeps them all: a block hands one of its streams on as it is, to a stage that looks at it later.
        """
        message = self._posted.popleft()
        self.tick = message.tick
        while (header := self._next_header())[0] == _ALIVE:
            if self._pass_on:
                self._pass_on()
            self._post_header()
        number, size = header
        if self.laid_out is None:  # the first message: only now it is known how large they are
            self.wait(self._first, LAYOUT)
            _, slots = self.lay_out(Body.from_json(json.loads(bytes(self._layout.numpy()).decode())))
            for waiting in (message, *self._posted):
                self._post_body(waiting, slots)
        assert self.laid_out is not None
        body, slots = self.laid_out
        if self._used is not None and not self.staged:
            slots.has_been_read(self._used)
        for part, work in message.works:
            self.wait(work, part)
        if self._behind:
            self._behind.follow(self.limit, str(self))
        self.running = True
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

    def _post_header(self) -> None:
        header = torch.empty(2, dtype=torch.int64)
        self._headers.append((header, self.begin(self.channel.irecv, header, HEADER)))

    def _next_header(self) -> tuple[int, int]:
        header, work = self._headers.popleft()
        self.wait(work, HEADER)
        number, size = header.tolist()
        return number, size

    def _post_body(self, message: _Message, slots: Slots) -> None:
        message.slot = slots.take()
        with slots.receiving(message.slot):
            self._irecv(message, message.slot, BODY)

    def _irecv(self, message: _Message, x: Tensor, part: int) -> None:
        message.works.append((part, self.begin(self.channel.irecv, x, part)))
