"""Bytes that a device holds while it trains a stage.

Peaks, counted as `LiveBytes` would count them from the profile's unit bytes; what an allocator or a library's
workspace adds is not in them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class StageMemory:
    """Bytes on one device.

    Attributes:
        parameters: of its stage.
        gradients: accumulated, and DDP's buckets.
        optimizer: state.
        graphs: what backward passes need: kept graphs, or the one that is rebuilt.
        inputs: kept for recomputation: PETRA's FIFOs in front of units without an inverse, DSP's stage inputs,
            the units' inputs of activation checkpointing.
        versions: older parameters (weight stashing).
        messages: received and sent streams and gradients.
    """

    parameters: int
    gradients: int
    optimizer: int
    graphs: int
    inputs: int = 0
    versions: int = 0
    messages: int = 0

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(getattr(self, field.name) for field in fields(self))

    def largest(self) -> tuple[str, int]:
        """The part that takes most, by name."""
        return max(((field.name, getattr(self, field.name)) for field in fields(self)), key=lambda part: part[1])
