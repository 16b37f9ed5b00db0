"""Methods: the registry, and that a new one is a stage of its own and one registration."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from petra_zoo.cli.main import app
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.errors import UserError
from petra_zoo.petra import METHODS, Method, find_method, measure, register_method
from petra_zoo.petra.footprint import keeps_stage_inputs
from petra_zoo.petra.messages import Down
from petra_zoo.petra.part import Part, StageSettings
from petra_zoo.petra.stage import Stage
from petra_zoo.planning.cluster import Cluster
from petra_zoo.planning.performance import forecast
from petra_zoo.planning.schedules import find_schedule
from petra_zoo.settings.recipe_files import load_recipe
from petra_zoo.training.engine import build_pipeline
from tests.petra.test_pipeline import SIZE, batches, make_model, make_pipeline, run, summed_gradients


class KeepingStage(Stage):
    """Keeps every unit's input: what PETRA computes, but with the exact inputs of a reconstruction."""

    def __init__(self, part: Part, settings: StageSettings) -> None:
        super().__init__(part, settings)
        self.seen: list[int] = []

    def _keeps_input(self, i: int) -> bool:
        return i >= self._lowest()

    def backward(self, down: Down) -> Down:
        self.seen.append(down.micro_batch)
        return super().backward(down)


KEEPING = Method("keeping", "keeps all inputs", KeepingStage, "rerun", streams_travel=True, keeps=keeps_stage_inputs)


@pytest.fixture
def keeping() -> Iterator[Method]:
    with METHODS.restored():
        yield register_method(KEEPING)


def test_a_new_method_trains_and_is_planned(keeping: Method, tmp_path: Path) -> None:
    data = batches(6)
    expected, found = (summed_gradients(method, 5, data) for method in ("backprop", "keeping"))
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) < 1e-9 * float(gradient.norm()) + 1e-12, name
    pipeline = make_pipeline(make_model(), 5, method="keeping")
    run(pipeline, data)
    assert all(isinstance(stage, KeepingStage) for stage in pipeline.stages)
    assert all(stage.seen == list(range(6)) for stage in pipeline.stages[:-1] if isinstance(stage, KeepingStage))

    recipe = load_recipe("digits/petra_revnet_tiny", ["method=keeping", "stages=3"])
    model = make_model(torch.float32)
    assert build_pipeline(recipe, model, 10, Preprocessing(SIZE, (0.5,) * 3, (0.5,) * 3)).method == keeping

    profile = measure(make_model(torch.float32), 2, SIZE, repeats=1)
    prediction, like = (forecast(profile, method, 4, Cluster()) for method in ("keeping", "dsp"))
    assert prediction.delay == (0.75, 0.5, 0.25, 0)
    assert [m.inputs for m in prediction.memory] == [m.inputs for m in like.memory]
    # The split follows measured times, and no stream comes down above a unit that is not reversible: look at one unit.
    reversible = next(unit for unit in profile.units if unit.reversible)
    links = [find_schedule(method).link(reversible) for method in ("keeping", "dsp")]
    assert [link.down // link.up for link in links] == [2, 1], "its streams come down as well"
    profile.save(tmp_path / "profile.json")
    shown = CliRunner().invoke(app, ["plan", profile.model, "--profile", str(tmp_path / "profile.json")])
    assert "\nkeeping\t" in shown.output


def test_a_method_is_found_by_its_name_or_given() -> None:
    assert list(METHODS) == ["petra", "dsp", "delayed", "local", "backprop", "reversible"]
    assert find_method("dsp") is METHODS["dsp"]
    assert find_method(KEEPING) is KEEPING
    with pytest.raises(UserError, match="unknown method 'delaid'; did you mean delayed"):
        find_method("delaid")


def test_a_name_belongs_to_one_method(keeping: Method) -> None:
    assert register_method(keeping) is keeping
    with pytest.raises(UserError, match="there is a method 'keeping' already"):
        register_method(Method("keeping", "another", Stage, "reverse"))


def test_recipes_name_registered_methods_only() -> None:
    with METHODS.restored():
        register_method(KEEPING)
        assert load_recipe("digits/petra_revnet_tiny", ["method=keeping"]).method == "keeping"
    for name, hint in (("keeping", "expected petra or dsp"), ("pert", "did you mean petra")):
        with pytest.raises(UserError, match=f"unknown method '{name}'; {hint}"):
            load_recipe("digits/petra_revnet_tiny", [f"method={name}"])


@pytest.mark.parametrize(
    ("method", "stages", "k", "delay"),
    [
        ("petra", 4, 1, (6.0, 4.0, 2.0, 0.0)),
        ("delayed", 3, 4, (1.0, 0.5, 0.0)),
        ("dsp", 1, 1, (0.0,)),
        ("local", 3, 1, (0.0, 0.0, 0.0)),
        ("backprop", 3, 1, (0.0, 0.0, 0.0)),
        ("reversible", 2, 1, (0.0, 0.0)),
    ],
)
def test_the_delay_is_counted_in_updates(method: str, stages: int, k: int, delay: tuple[float, ...]) -> None:
    assert METHODS[method].delay(stages, k) == delay
    assert make_pipeline(make_model(), stages, method=method, accumulation_steps=k).delay == delay


def test_the_last_stage_works_as_its_method_says() -> None:
    petra = METHODS["petra"]
    assert (petra.work, petra.last_work) == ("reverse", "graph")
    assert petra.with_last_stage("recompute").last_work == "reverse"
    assert petra.with_last_stage("recompute").with_last_stage("graph") == petra


def test_every_method_is_described_and_only_what_never_drains_is_planned() -> None:
    assert all(method.summary for method in METHODS.values())
    assert [name for name, method in METHODS.items() if method.keeps] == ["petra", "dsp", "delayed"]
