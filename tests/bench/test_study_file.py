"""The file of an accuracy study: what it means, and what is wrong with it in one line."""

from pathlib import Path

import pytest
import yaml

from petra_zoo.bench.accuracy_plan import AccuracyPlan, overrides_of, train_command
from petra_zoo.bench.results import Record, Results
from petra_zoo.bench.study import Trial
from petra_zoo.bench.study_file import load_study
from petra_zoo.errors import UserError
from petra_zoo.strict_json import Json

ROOT = Path(__file__).parents[2]
STUDY: dict[str, Json] = {
    "recipe": "digits/petra_revnet_tiny",
    "settings": {"epochs": 8, "stages": 4},
    "seeds": 2,
    "search": {"seed": 1000, "settings": {"epochs": 1}},
    "contenders": {
        "backprop": {"method": "backprop", "lr": [0.01, 0.02]},
        "petra": {"lr_of": "backprop", "paired_with": "backprop", "seeds": [1]},
        "slow": {"lr": 0.001},
    },
}


def plan_of(tmp_path: Path, content: Json = STUDY, seeds: int | None = None) -> AccuracyPlan:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return load_study(path, seeds=seeds)


def ended(results: Results, trial: Trial, top1: float, loss: float = 1.0) -> None:
    results.add(Record(trial.contender, trial.repeat, trial.settings, "", {"top1": top1, "loss": loss}))


def found_so_far(plan: AccuracyPlan, *top1: float) -> Results:
    """The search's runs have ended with these, in order."""
    results = Results("accuracy", plan.name)
    for trial, value in zip(plan.search_trials(results), top1, strict=True):
        ended(results, trial, value)
    return results


def test_learning_rates_are_searched_first_and_the_best_is_taken(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    first = plan.trials(Results("accuracy", "mine"))
    assert [(t.contender, t.repeat) for t in first] == [("backprop", 1000)] * 2 + [("slow", 0), ("slow", 1)]
    assert train_command(first[0]) == (
        "petra-zoo train digits/petra_revnet_tiny epochs=1 stages=4 method=backprop lr=0.01 seed=1000"
    )
    then = plan.trials(found_so_far(plan, 80.0, 90.0))[2:]
    assert [(t.contender, t.repeat) for t in then] == [
        ("backprop", 0),
        ("slow", 0),
        ("backprop", 1),
        ("petra", 1),
        ("slow", 1),
    ]
    assert "lr=0.02" in overrides_of(then[0])
    assert "lr=0.02" in overrides_of(then[3])
    assert "lr=0.001" in overrides_of(then[1])


def test_of_equal_top1_the_lower_loss_wins_and_a_failed_rate_never(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    low, high = plan.search_trials(Results("accuracy", "mine"))
    results = Results("accuracy", "mine")
    ended(results, low, 90.0, loss=0.5)
    ended(results, high, 90.0, loss=0.4)
    assert plan.rate(plan.find("petra"), results) == 0.02
    results.add(Record(high.contender, high.repeat, high.settings, "", {"failed": "diverged"}))
    assert plan.rate(plan.find("petra"), results) == 0.01


@pytest.mark.parametrize(("top1", "rates"), [((80.0, 82.0), (0.01, 0.02, 0.04)), ((80.0, 80.9), (0.01, 0.02))])
def test_a_rate_that_wins_at_the_edge_is_doubled_once(
    tmp_path: Path, top1: tuple[float, float], rates: tuple[float, ...]
) -> None:
    plan = plan_of(tmp_path, {**STUDY, "search": {"double_above": 1}})
    assert plan.rates(plan.find("backprop"), found_so_far(plan, *top1)) == rates


def test_every_contender_is_trained_on_every_task(tmp_path: Path) -> None:
    tasks = {name: {"recipe": f"{name}/petra_revnet_tiny"} for name in ("digits", "shapes")}
    contenders = {"backprop": {"method": "backprop"}, "petra": {"paired_with": "backprop"}}
    plan = plan_of(tmp_path, {"tasks": tasks, "contenders": contenders})
    assert [c.name for c in plan.contenders] == [
        "backprop on digits", "petra on digits", "backprop on shapes", "petra on shapes"
    ]  # fmt: skip
    assert plan.contenders[3].paired_with == "backprop on shapes"
    assert plan.contenders[3].recipe == "shapes/petra_revnet_tiny"


def test_seeds_can_be_more_or_fewer_than_the_files(tmp_path: Path) -> None:
    assert [c.seeds for c in plan_of(tmp_path, seeds=3).contenders] == [(0, 1, 2), (1, 2, 3), (0, 1, 2)]
    assert [c.seeds for c in plan_of(tmp_path, seeds=1).contenders] == [(0,), (1,), (0,)]


def test_delay_and_optimizer_are_those_of_the_recipe(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert [(c.delay, c.opt) for c in plan.contenders] == [(0, "muon"), (3, "muon"), (3, "muon")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"contendrs": {}}, "unknown key 'contendrs'; did you mean 'contenders'?"),
        ({"search": {"sead": 1}}, "unknown key 'search: sead'; did you mean 'seed'?"),
        ({"seeds": 0}, "seeds=0: expected a number, or a list of seeds$"),
        ({"settings": [1]}, "settings: expected a mapping, lines of KEY: VALUE$"),
        ({"search": True}, "search: expected a mapping, lines of KEY: VALUE$"),
        ({"settings": {"model_kwargs": {1: 2}}}, "settings: model_kwargs: .*expected text in the place of this key$"),
        ({"contenders": {"a": {"lr": [None]}}}, "contender 'a': lr=.*expected learning rates to choose from"),
        ({"recipe": None}, "expected one of recipe and tasks"),
        ({"recipe": "digits/petra_revnet_tny"}, "did you mean 'digits/petra_revnet_tiny'?"),
        ({"contenders": {}}, "contenders: expected at least one entry$"),
        ({"contenders": {"a": {"metod": "petra"}}}, "contender 'a': unknown setting 'metod'; did you mean 'method'?"),
        ({"contenders": {"a": {"method": "petr"}}}, "contender 'a': .*did you mean petra"),
        ({"contenders": {"a": {"opt": "sgdd"}}}, "contender 'a': .*opt='sgdd': expected an optimizer"),
        ({"contenders": {"a": {"seed": 3}}}, "contender 'a': seed is no setting of a contender: say seeds"),
        ({"contenders": {"a": {"seeds": "3"}}}, "contender 'a': seeds='3': expected a number"),
        ({"contenders": {"a": {"paired_with": "b"}, "bb": {}}}, "no other contender 'b'; did you mean 'bb'?"),
        ({"contenders": {"a": {"paired_with": "a"}}}, "there is no other contender 'a'"),
        ({"contenders": {"a": {"lr_of": "b"}, "b": {"lr": 0.1}}}, "lr_of: 'b' has no list for lr"),
        ({"contenders": {"a": {"lr": [0.1, -1]}}}, "contender 'a': lr=-1: expected greater than 0"),
        ({"search": None, "contenders": {"a": {"lr": [0.1]}}}, "a list for lr needs a section 'search'"),
        ({"contenders": {"a": {"lr": [0.1, 0.1]}}}, "contender 'a': lr=.*each once"),
        ({"contenders": {"a": {"lr": []}}}, "contender 'a': lr=.*expected learning rates to choose from"),
        ({"contenders": {"a": {"seeds": [3, 3]}}}, "contender 'a': seeds=.*a seed stands twice"),
        ({"contenders": {"a": {}, "b": {"paired_with": ["a"]}}}, "there is no other contender .*expected one of a"),
        ({"search": {"settings": {"lr": 1.0}}}, "lr and lr_base are what is searched: leave them out"),
        ({"search": {"settings": {"seed": 1}}}, "seed is no setting of a contender"),
        ({"search": {"settings": {"epoch": 1}}}, "unknown setting 'epoch'; did you mean 'epochs'?"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_the_nearest(tmp_path: Path, change: dict[str, Json], words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        plan_of(tmp_path, {**STUDY, **change})
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("study mine: ")


def test_a_file_that_is_not_there_or_no_yaml_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"study file .* cannot be read"):
        load_study(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match="study bad: not valid YAML"):
        load_study(tmp_path / "bad.yaml")


@pytest.mark.parametrize("path", [None, *sorted((ROOT / "benchmarks").rglob("*.yaml"))], ids=lambda p: p and p.stem)
def test_the_studies_that_come_along_are_right(path: Path | None) -> None:
    assert load_study(path).contenders
