"""An accuracy study with everything resolved: which runs there are, and which learning rate each contender takes.

It is kept in the results file, so that tables are made from that file alone. Imports no torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Self

from pydantic import BaseModel, ConfigDict, JsonValue, model_validator

from petra_zoo.bench.results import Record, Results
from petra_zoo.bench.study import Trial, interleaved
from petra_zoo.settings.merging import lay_over
from petra_zoo.settings.yaml12 import read_yaml
from petra_zoo.strict_json import Json, JsonObject, to_json


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Contender(_Frozen):
    """What is trained, once per seed.

    Attributes:
        name: tells it from all others.
        label: in tables; contenders on different tasks share it.
        task: what it is trained on, where the study has several; else empty.
        recipe: that its runs start from.
        settings: laid over the recipe's.
        seeds: that it is trained with.
        rates: learning rates to choose from; empty where `settings` or the recipe say it.
        rates_of: the contender whose search decides; itself, another one, or empty.
        paired_with: the contender whose seeds it is compared with, or empty.
        method, opt, stages, delay: of its recipe with its settings; the delay is the first stage's, in updates.
    """

    name: str
    label: str
    task: str = ""
    recipe: str
    settings: dict[str, JsonValue] = {}
    seeds: tuple[int, ...]
    rates: tuple[float, ...] = ()
    rates_of: str = ""
    paired_with: str = ""
    method: str = ""
    opt: str = ""
    stages: int = 1
    delay: float = 0.0


class Search(_Frozen):
    """How learning rates are tried, before anything else.

    Attributes:
        seed: of these runs, and of no others.
        settings: laid over a contender's own.
        double_above: points of top-1 by which the largest rate must be the best for twice that rate to be tried too;
            None: never.
    """

    seed: int = 1000
    settings: dict[str, JsonValue] = {}
    double_above: float | None = None


class AccuracyPlan(_Frozen):
    """An accuracy study.

    Attributes:
        name: of the study.
        contenders: in the order of tables.
        search: of learning rates, where a contender has several.
        probe: measure every stage's gradient every so many micro-batches; None: never.
    """

    name: str
    contenders: tuple[Contender, ...]
    search: Search | None = None
    probe: int | None = None

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        """A plan is read from results files, too, which anybody can change."""
        names = {contender.name for contender in self.contenders}
        for contender in self.contenders:
            if unknown := {contender.rates_of, contender.paired_with} - names - {""}:
                raise ValueError(f"'{contender.name}' names '{unknown.pop()}', which there is not")
            if contender.rates and self.search is None:
                raise ValueError(f"'{contender.name}' has rates to choose from, but there is no search")
        return self

    @property
    def tasks(self) -> list[str]:
        """In order; one empty name where there is one task."""
        return list(dict.fromkeys(contender.task for contender in self.contenders))

    def find(self, name: str) -> Contender:
        """The contender of that name."""
        return next(contender for contender in self.contenders if contender.name == name)

    def trials(self, results: Results) -> list[Trial]:
        """What can be run: the search, and every contender whose learning rate is known by now."""
        ready = [c for c in self.contenders if not c.rates_of or self.rate(c, results) is not None]
        by_name, seeds = {c.name: c for c in ready}, sorted({seed for c in ready for seed in c.seeds})
        turns = [(by_name[name], seed) for name, seed in interleaved(list(by_name), seeds, shuffled=False)]
        final = [self.trial(contender, seed, results) for contender, seed in turns if seed in contender.seeds]
        return [*self.search_trials(results), *final]

    def search_trials(self, results: Results) -> list[Trial]:
        """Every contender's first rate, then every one's second, and so on."""
        rates = {contender.name: self.rates(contender, results) for contender in self.contenders}
        return [
            self.search_trial(contender, rates[contender.name][place])
            for place in range(max(map(len, rates.values())))
            for contender in self.contenders
            if place < len(rates[contender.name])
        ]

    def rates(self, contender: Contender, results: Results) -> tuple[float, ...]:
        """The learning rates of a contender's own search: twice the largest, too, where that one won clearly."""
        if self.search is None or self.search.double_above is None or len(contender.rates) < 2:
            return contender.rates
        found = [results.find(self.search_trial(contender, rate)) for rate in sorted(contender.rates)]
        *others, largest = [0.0 if run is None or run.failed else run.number("top1") for run in found]
        won = all(found) and largest > max(others) + self.search.double_above
        return (*contender.rates, 2 * max(contender.rates)) if won else contender.rates

    def search_trial(self, contender: Contender, rate: float) -> Trial:
        """A short run that tries a learning rate."""
        assert self.search is not None
        settings = lay_over(lay_over(contender.settings, {"lr": rate}), self.search.settings)
        return Trial(contender.name, self.search.seed, self._settings(contender, settings, search=True))

    def trial(self, contender: Contender, seed: int, results: Results) -> Trial:
        """A run that counts, with the learning rate that was found."""
        rate = self.rate(contender, results)
        settings = contender.settings if rate is None else lay_over(contender.settings, {"lr": rate})
        return Trial(contender.name, seed, self._settings(contender, settings))

    def rate(self, contender: Contender, results: Results) -> float | None:
        """The learning rate with the best top-1 of those tried, of equals the one with the lower loss.

        None while the search is going on, where all rates failed, and where there is nothing to search.
        """
        if not contender.rates_of:
            return None
        tried = self.tried(self.find(contender.rates_of), results)
        if any(run is None for run in tried.values()):
            return None
        good = {rate: run for rate, run in tried.items() if run is not None and not run.failed}
        return max(good, key=lambda rate: (good[rate].number("top1"), -good[rate].number("loss")), default=None)

    def tried(self, contender: Contender, results: Results) -> dict[float, Record | None]:
        """What came out of a contender's own search, by learning rate; None where a run is missing."""
        return {rate: results.find(self.search_trial(contender, rate)) for rate in self.rates(contender, results)}

    def runs(self, contender: Contender, results: Results) -> list[Record]:
        """The runs that count, by seed: of the settings that the study has now, and no others."""
        trials = [self.trial(contender, seed, results) for seed in contender.seeds]
        return [run for trial in trials if (run := results.find(trial)) is not None]

    def _settings(self, contender: Contender, overrides: Mapping[str, Json], *, search: bool = False) -> JsonObject:
        marks: JsonObject = {"search": True} if search else {"probe": self.probe} if self.probe else {}
        return {"recipe": contender.recipe, "overrides": dict(overrides), **marks}


def overrides_of(trial: Trial) -> list[str]:
    """A trial's settings as the command line has them, the seed last."""
    overrides = trial.settings["overrides"]
    assert isinstance(overrides, dict)
    return [*(f"{name}={_in_yaml(value)}" for name, value in overrides.items()), f"seed={trial.repeat}"]


def rate_of(trial: Trial) -> float | None:
    """The learning rate that a trial's settings say."""
    overrides = trial.settings["overrides"]
    rate = overrides.get("lr") if isinstance(overrides, dict) else None
    return float(rate) if isinstance(rate, int | float) else None


def train_command(trial: Trial) -> str:
    """What a user types to repeat a run."""
    return shlex.join(["petra-zoo", "train", str(trial.settings["recipe"]), *overrides_of(trial)])


def _in_yaml(value: Json) -> str:
    if isinstance(value, str) and read_yaml(value) == value:  # needs no quotes
        return value
    return to_json(value).replace(": ", ":").replace(", ", ",") if isinstance(value, Sequence) else to_json(value)
