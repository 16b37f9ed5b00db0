"""Links between processes: queues inside a rank, and channels to the ranks beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from petra_zoo.petra.link_ends import Inlet, Outlet, Unpacked
from petra_zoo.petra.links import Item, Links, Wire
from petra_zoo.petra.messages import Down, Up
from petra_zoo.petra.parcels import Parcel
from petra_zoo.petra.signs_of_life import awaited
from petra_zoo.petra.world import World


def make_links(
    world: World,
    owned: range,
    wire: Wire | None = None,
    *,
    evaluation: bool = False,
    running: bool = False,
    patient: int = 0,
) -> Links:
    """A rank's links: queues where it is alone; the arguments are those of `ProcessLinks`."""
    if world.size == 1:
        return Links(wire or world.wire)
    return ProcessLinks(world, owned, wire, evaluation=evaluation, running=running, patient=patient)


class ProcessLinks(Links):
    """Links of a rank's stages: queues inside it, channels to the ranks beside it.

    Args:
        world: this rank's place; its wire's timeout holds once the first ticks are over.
        owned: its stages.
        wire: types of messages; default: the world's.
        evaluation: whether they take the evaluation's channels, where nothing of the training is under way.
        running: whether the first tick is over: the timeout holds from the first message on.
        patient: for how many ticks it does not hold yet.
    """

    def __init__(
        self,
        world: World,
        owned: range,
        wire: Wire | None = None,
        *,
        evaluation: bool = False,
        running: bool = False,
        patient: int = 0,
    ) -> None:
        super().__init__(wire or world.wire)
        self.world, self.owned = world, owned
        ways = world.evaluation_channels if evaluation else world.channels
        self._to_above = Outlet(world, ways.to_above, "up", owned[-1] + 1) if ways.to_above else None
        pass_on = self._to_above.say_alive if self._to_above else None
        self._from_below = Inlet(world, ways.from_below, "up", owned[0], pass_on) if ways.from_below else None
        self._from_above = Inlet(world, ways.from_above, "down", owned[-1]) if ways.from_above else None
        self._to_below = Outlet(world, ways.to_below, "down", owned[0] - 1) if ways.to_below else None
        ends = (self._from_below, self._from_above, self._to_above, self._to_below)
        self._ends = [end for end in ends if end]
        self._outlets = [end for end in ends if isinstance(end, Outlet)]
        self._patient = patient
        for end in self._ends:
            end.running = running

    def expect(self, tick: int, ups: Iterable[int], downs: Iterable[int]) -> None:
        for outlet in self._outlets:
            outlet.next_tick()
        self._patient -= 1
        begun = any(end.running for end in self._ends)  # the other ranks have, then, as well
        for end in self._ends:
            end.running, end.patient = begun, self._patient >= 0
        if self._from_below and self.owned[0] in ups:
            self._from_below.post(tick)
        if self._from_above and self.owned[-1] in downs:
            self._from_above.post(tick)

    def send_up(self, to: int, up: Up) -> None:
        if to in self.owned or not self._to_above:
            return super().send_up(to, up)
        self._to_above.send(up.micro_batch, Parcel.of(up, self.wire))

    def send_down(self, to: int, down: Down) -> None:
        if to in self.owned or not self._to_below:
            return super().send_down(to, down)
        self._to_below.send(down.micro_batch, Parcel.of(down, self.wire))

    def receive_up(self, stage: int, keep: bool = False) -> Up:
        if stage != self.owned[0] or not self._from_below or self.ups.get(stage):  # some came back out of a state
            return super().receive_up(stage, keep)
        return _up(self._from_below.receive(keep or len(self.owned) > 1))

    def receive_down(self, stage: int) -> Down:
        if stage != self.owned[-1] or not self._from_above or self.downs.get(stage):
            return super().receive_down(stage)
        return _down(self._from_above.receive(len(self.owned) > 1))

    def sent_by(self, stage: int) -> tuple[list[Up], list[Down]]:
        ups, downs = super().sent_by(stage)
        if stage == self.owned[-1] and self._to_above and (sent := self._to_above.look_back()):
            ups = [_up(sent)]
        if stage == self.owned[0] and self._to_below and (sent := self._to_below.look_back()):
            downs = [_down(sent)]
        return ups, downs

    def resend_up(self, to: int, up: Up) -> None:
        if to == self.owned[0] and self._from_below:
            self._from_below.adopt(Parcel.of(up, self.wire))
        if to in self.owned:
            super().resend_up(to, up)
        elif to == self.owned[-1] + 1 and self._to_above:
            self._to_above.hold(up.micro_batch, Parcel.of(up, self.wire))  # the rank above has read it for itself

    def resend_down(self, to: int, down: Down) -> None:
        if to == self.owned[-1] and self._from_above:
            self._from_above.adopt(Parcel.of(down, self.wire))
        if to in self.owned:
            super().resend_down(to, down)
        elif to == self.owned[0] - 1 and self._to_below:
            self._to_below.hold(down.micro_batch, Parcel.of(down, self.wire))

    def awaited(self, items: Iterable[Item]) -> Iterable[Item]:
        if not self.world.first or not self._to_above:
            return items
        return awaited(items, self._to_above.say_alive, self._to_above.timeout.total_seconds() / 4)

    def begin_with(self, images: int) -> None:
        for end in self._ends:
            end.images = images

    def finish(self) -> None:
        for outlet in self._outlets:
            outlet.finish()


def _up(message: Unpacked) -> Up:
    number, tensors, _ = message
    *streams, labels = _present(tensors)
    return Up(number, tuple(streams), labels.clone())  # labels are handed to the user


def _down(message: Unpacked) -> Down:
    number, tensors, streams = message
    return Down(number, _present(tensors[:streams]), tuple(tensors[streams:]))  # only gradients may be missing


def _present(tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    found = tuple(x for x in tensors if x is not None)
    assert len(found) == len(tensors), "a message without one of its streams"
    return found
