"""A study that takes no time, of contenders that behave as their names say."""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from petra_zoo.bench.results import Results
from petra_zoo.bench.study import Study, Trial, interleaved
from petra_zoo.errors import Failure, UserError
from petra_zoo.strict_json import JsonObject


@dataclass(frozen=True)
class Toy(Study):
    """Measures how long a contender's name is; leaves a line in `log` for every run and every end."""

    kind: ClassVar[str] = "toy"
    shares_the_machine: ClassVar[bool] = True
    log: Path
    contenders: Sequence[str] = ("one", "three")
    repeats: int = 2
    settings: str = "as ever"

    def trials(self, results: Results) -> list[Trial]:
        pairs = interleaved(self.contenders, range(self.repeats), shuffled=False)
        return [Trial(name, repeat, {"as": self.settings}) for name, repeat in pairs]

    def run(self, trial: Trial) -> JsonObject:
        self._note(f"{trial} by {os.getpid()}")
        if trial.contender == "diverges":
            raise Failure("the loss is infinite")
        if trial.contender == "mistaken":
            raise UserError("there is no such thing")
        if trial.contender == "broken":
            raise ZeroDivisionError("a mistake of ours")
        if trial.contender == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if trial.contender == "endless":
            time.sleep(100)
        return {"letters": len(trial.contender), "threads": os.environ["OMP_NUM_THREADS"]}

    def command(self, trial: Trial) -> str:
        return f"count the letters of {trial.contender}"

    def close(self) -> None:
        self._note("closed")

    def _note(self, text: str) -> None:
        with self.log.open("a") as file:
            file.write(f"{text}\n")
