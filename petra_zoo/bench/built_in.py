"""Studies that come with the package as they are: in full, or quick, to see that everything works."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Self

from petra_zoo.bench.results import Trial
from petra_zoo.bench.study import Study


@dataclass(frozen=True, kw_only=True)
class BuiltInStudy(Study):
    """A study without a file of its own.

    Attributes:
        quick: whether it is the small one, whose results say nothing: another study, with another results file.
    """

    quick: bool = False

    @classmethod
    @abstractmethod
    def small(cls) -> Self:
        """The quick one."""

    @property
    def name(self) -> str:
        return f"{self.kind}, quick" if self.quick else self.kind

    def command(self, trial: Trial) -> str:
        return f"petra-zoo bench {self.kind}{' --quick' if self.quick else ''}"
