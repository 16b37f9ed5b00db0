"""The accuracy study: what `petra-zoo train` does, contender by contender and seed by seed."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from petra_zoo.bench.accuracy_plan import AccuracyPlan, overrides_of, rate_of, train_command
from petra_zoo.bench.results import Results
from petra_zoo.bench.study import Study, Trial
from petra_zoo.errors import Failure
from petra_zoo.settings.recipe_files import load_recipe
from petra_zoo.strict_json import JsonObject


@dataclass(frozen=True)
class AccuracyStudy(Study):
    """Trains contenders with paired seeds; learning rates that a contender can choose from are tried first."""

    kind: ClassVar[str] = "accuracy"
    shares_the_machine: ClassVar[bool] = True
    plan: AccuracyPlan

    @property
    def name(self) -> str:
        return self.plan.name

    def about(self) -> JsonObject:
        about: JsonObject = self.plan.model_dump(mode="json")
        return about

    def trials(self, results: Results) -> list[Trial]:
        return self.plan.trials(results)

    def expected(self, results: Results) -> int:
        return len(self.plan.search_trials(results)) + sum(len(c.seeds) for c in self.plan.contenders)

    def command(self, trial: Trial) -> str:
        return train_command(trial)

    def title(self, trial: Trial) -> str:
        rate, search = rate_of(trial), "search, " if trial.settings.get("search") else ""
        return f"{trial.contender} ({search}{'' if rate is None else f'lr {rate:g}, '}seed {trial.repeat})"

    def run(self, trial: Trial) -> JsonObject:
        """Trains once, into a folder that is thrown away; see `measured_training`."""
        from petra_zoo.bench.training_run import measured_training

        probe = trial.settings.get("probe")
        with tempfile.TemporaryDirectory() as folder:
            output = f"output={Path(folder) / 'run'}"
            recipe = load_recipe(str(trial.settings["recipe"]), [*overrides_of(trial), output])
            try:
                return measured_training(recipe, probe if isinstance(probe, int) else None)
            except Failure as error:  # without the place, which is gone
                raise Failure(str(error).replace(f"{folder}/", "")) from error
