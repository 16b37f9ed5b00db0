"""The channels that keep to NCCL's rules notice what breaks them."""

import queue
from datetime import timedelta

import pytest
import torch
from torch import Tensor

from petra_zoo.petra.channels import BODY
from tests.petra import strict_channels
from tests.petra.strict_channels import StrictChannel


class Done:
    def wait(self, timeout: timedelta | None = None) -> bool:
        return True


class Pipe:
    """One end's gloo, both ways within one process."""

    def __init__(self) -> None:
        self.sent: queue.Queue[Tensor] = queue.Queue()

    def isend(self, x: Tensor, part: int) -> Done:
        self.sent.put(x.clone())
        return Done()

    def irecv(self, x: Tensor, part: int) -> Done:
        x.copy_(self.sent.get(timeout=10))
        return Done()


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> tuple[StrictChannel, StrictChannel]:
    pipe = Pipe()
    monkeypatch.setattr(strict_channels, "GroupChannel", lambda *_: pipe)
    monkeypatch.setattr(strict_channels, "ERRORS", [])
    out, into = (StrictChannel(0, None, None) for _ in range(2))  # type: ignore[arg-type]
    out.isend(torch.zeros(1), BODY)
    into.irecv(torch.zeros(1), BODY)
    return out, into


def test_what_arrives_is_what_was_sent(ends: tuple[StrictChannel, StrictChannel]) -> None:
    found = torch.zeros(3)
    ends[0].isend(torch.arange(3.0), BODY)
    ends[1].irecv(found, BODY).wait()  # type: ignore[union-attr]
    assert found.tolist() == [0, 1, 2]
    assert strict_channels.ERRORS == []


def test_nobody_reads_before_waiting(ends: tuple[StrictChannel, StrictChannel]) -> None:
    found = torch.zeros(3)
    ends[1].irecv(found, BODY)
    assert found.isnan().all()
    ends[0].isend(torch.arange(3.0), BODY)


def test_nobody_writes_over_what_is_being_sent(ends: tuple[StrictChannel, StrictChannel]) -> None:
    x = torch.zeros(3)
    work = ends[0].isend(x, BODY)
    x += 1
    work.wait()  # type: ignore[union-attr]
    assert strict_channels.ERRORS == ["what was sent changed before it had gone"]


def test_nobody_waits_with_a_timeout(ends: tuple[StrictChannel, StrictChannel]) -> None:
    ends[0].isend(torch.zeros(3), BODY).wait(timedelta(seconds=9))  # type: ignore[union-attr]
    assert strict_channels.ERRORS == ["a wait with a timeout"]
