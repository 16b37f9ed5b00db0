"""How long schedules take: PETRA's tick, and an update of GPipe and 1F1B.

Everything here is arithmetic over the seconds that stages and links take for one micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Operation = tuple[Literal["forward", "backward"], int]  # and its micro-batch


def tick_seconds(stages: Sequence[float], up: Sequence[float], down: Sequence[float]) -> float:
    """Seconds between two micro-batches of a pipeline that never drains, in the long run.

    A stage goes forward and backward once per tick and takes what its neighbours sent in the tick before, so a message
    may take the time of the other half of the tick for free. What remains is the slowest of: a stage; a link; and every
    loop that climbs from one stage to another and comes back, a tick for each link on its way and one for the turn.

    Args:
        stages: forward and backward of each stage.
        up: of each link between neighbours, a message up.
        down: a message down.
    """
    slowest = max(*stages, *up, *down, 0.0)
    for first in range(len(stages)):
        loop = stages[first]
        for last in range(first + 1, len(stages)):
            loop += stages[last] + up[last - 1] + down[last - 1]
            slowest = max(slowest, loop / (2 * (last - first) + 1))
    return slowest


def gpipe(stages: int, micro_batches: int) -> list[list[Operation]]:
    """GPipe (Huang et al. 2019): all forwards, then all backwards. The order of operations in each stage."""
    forwards: list[Operation] = [("forward", n) for n in range(micro_batches)]
    backwards: list[Operation] = [("backward", n) for n in range(micro_batches)]
    return [forwards + backwards for _ in range(stages)]


def one_forward_one_backward(stages: int, micro_batches: int) -> list[list[Operation]]:
    """1F1B (PipeDream-flush): stage r runs p - r forwards ahead, then one backward and one forward in turn."""
    orders = []
    for r in range(stages):
        ahead = min(micro_batches, stages - r)
        order: list[Operation] = [("forward", n) for n in range(ahead)]
        for n in range(micro_batches):
            order.append(("backward", n))
            if n + ahead < micro_batches:
                order.append(("forward", n + ahead))
        orders.append(order)
    return orders


def update_seconds(
    orders: Sequence[Sequence[Operation]],
    forward: Sequence[float],
    backward: Sequence[float],
    up: Sequence[float],
    down: Sequence[float],
) -> float:
    """Seconds from the first forward to the last backward of a synchronous schedule.

    Args:
        orders: operations of each stage, in the order in which it runs them.
        forward: of each stage, for one micro-batch.
        backward: of each stage.
        up: of each link between neighbours; a stage does not wait for what it sends.
        down: likewise.

    Raises:
        ValueError: stages wait for each other forever.
    """
    seconds = {"forward": forward, "backward": backward}
    ended: dict[tuple[int, str, int], float] = {}
    clocks = [0.0] * len(orders)
    positions = [0] * len(orders)
    remaining = sum(map(len, orders))
    while remaining:
        before = remaining
        for r, order in enumerate(orders):
            while positions[r] < len(order):
                kind, n = order[positions[r]]
                source, link = (r - 1, up[r - 1 :]) if kind == "forward" else (r + 1, down[r:])
                arrives = 0.0
                if 0 <= source < len(orders):
                    if (source, kind, n) not in ended:
                        break
                    arrives = ended[source, kind, n] + link[0]
                clocks[r] = max(clocks[r], arrives) + seconds[kind][r]
                ended[r, kind, n] = clocks[r]
                positions[r] += 1
                remaining -= 1
        if remaining == before:
            raise ValueError("these orders of operations make stages wait for each other forever")
    return max(clocks)
