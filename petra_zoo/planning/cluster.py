"""The devices of a prediction and the links between them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cluster:
    """Equal devices with equal links between neighbours.

    Attributes:
        bandwidth: of a link, bytes per second in each direction.
        latency: of a message, seconds.
        memory: of a device, bytes; None: no limit.
    """

    bandwidth: float = float("inf")
    latency: float = 0.0
    memory: float | None = None

    def seconds(self, size: float) -> float:
        """Seconds that a message of this many bytes takes."""
        return self.latency + size / self.bandwidth

    def all_reduce_seconds(self, size: float, replicas: int) -> float:
        """Seconds of a ring all-reduce: 2 (D - 1) steps, each with a D-th of the bytes."""
        return 2 * (replicas - 1) * self.seconds(size / replicas)


@dataclass(frozen=True)
class Link:
    """Bytes per micro-batch (PETRA: per tick) between two neighbouring stages."""

    up: int
    down: int
