"""Profiles: what each unit of a model costs here.

Balancing a layout and predicting a pipeline (`petra_zoo.planning`) both start from a profile. It is measured once
(`measuring.py`), saved as JSON and sent to the other ranks, so that all of them compute the same layout.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from petra_zoo.errors import UserError
from petra_zoo.petra.methods import Method, find_method
from petra_zoo.petra.unit_profile import UnitProfile

_LARGEST = 64 << 20  # bytes; thousands of units take less than one mebibyte


@dataclass(frozen=True)
class Profile:
    """What the units of a model cost for one micro-batch, and where that was measured."""

    model: str
    batch_size: int
    input_size: tuple[int, int, int]
    autocast: str | None
    device: str
    threads: int
    machine: str
    versions: dict[str, str]
    units: tuple[UnitProfile, ...]

    def costs(self, method: str | Method = "petra", *, last_stage: bool = False) -> list[float]:
        """Seconds of each unit for one micro-batch.

        Args:
            method: of `Pipeline`.
            last_stage: the cost in the last stage, which needs no recomputation where it keeps its graph.
        """
        found = find_method(method)
        return [unit.seconds(found.last_work if last_stage else found.work) for unit in self.units]

    def to_json(self) -> str:
        """The profile as JSON text."""
        return TypeAdapter(Profile).dump_json(self, indent=1).decode() + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Profile:
        """Reads what `to_json` gave.

        Raises:
            ValueError: the text is not a profile.
        """
        return TypeAdapter(cls).validate_json(text)

    def save(self, path: Path) -> None:
        """Writes JSON; an existing file is replaced at once or not at all."""
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            beside.write_text(self.to_json())
            beside.replace(path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise UserError(f"cannot write the profile {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Reads a saved profile.

        Raises:
            UserError: no such file, or it is not a profile.
        """
        try:
            if (size := path.stat().st_size) > _LARGEST:
                raise UserError(f"{path} is not a profile: it has {size:,} bytes")
            return cls.from_json(path.read_bytes())
        except OSError as error:
            raise UserError(f"cannot read the profile {path}: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise UserError(
                f"{path} is not a profile: {where}: {first['msg']}; petra-zoo plan MODEL --save-profile FILE writes one"
            ) from error
