"""Waiting for other processes, and what is said when it was in vain."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from petra_zoo.petra.links import LinkError


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
