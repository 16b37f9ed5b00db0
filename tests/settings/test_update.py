"""What an update takes: `update_size` and `max_delay` choose micro-batch and k; what cannot be chosen is refused."""

import re
from pathlib import Path

import pytest

from petra_zoo.errors import UserError
from petra_zoo.settings.delay import advice, border
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.recipe_files import load_recipe, override_recipe, recipe_yaml, save_recipe
from petra_zoo.settings.update import SMALLEST_FOR_BATCH_NORM, choose_accumulation_steps, nearest_choices

SHAPES = str(Path(__file__).with_name("by_batch_size.yaml"))  # 4 stages, micro-batches of 64
BOTH = ["update_size=64", "max_delay=3"]


def update(*overrides: str, name: str = SHAPES) -> tuple[int, int, float]:
    recipe = load_recipe(name, overrides)
    return recipe.batch_size, recipe.accumulation_steps, recipe.delay[0]


def refusal(*overrides: str, name: str = SHAPES) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(name, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["max_delay=6"], (64, 1, 6.0)),
        (["max_delay=5.9"], (32, 2, 3.0)),
        (["max_delay=1"], (8, 8, 0.75)),
        (["max_delay=4", "stages=14"], (8, 8, 3.25)),
        (["max_delay=4", "stages=14", "split=[1,1,1,1,1,1,1,1,1,1,1,1,1,1]"], (8, 8, 3.25)),
        (["max_delay=3", "data_parallel=2"], (16, 2, 3.0)),
        (["max_delay=0", "stages=1"], (64, 1, 0.0)),
        (["max_delay=3", "update_size=96", "data_parallel=3"], (16, 2, 3.0)),
    ],
)
def test_the_smallest_k_is_chosen_that_keeps_the_delay(overrides: list[str], expected: tuple[int, int, float]) -> None:
    assert update("update_size=64", *overrides) == expected


@pytest.mark.parametrize("method", ["backprop", "reversible", "local"])
def test_the_exact_controls_get_the_same_micro_batches(method: str) -> None:
    assert update(*BOTH, f"method={method}") == (32, 2, 0.0)


def test_a_method_without_delay_needs_no_k_where_the_others_find_none() -> None:
    assert choose_accumulation_steps(8, 0.5, 14, 1, "backprop") == 1
    assert choose_accumulation_steps(64, 0.0, 4, 1, "reversible") == 1


def test_update_size_alone_takes_the_place_of_batch_size() -> None:
    assert update("update_size=128") == (128, 1, 6.0)
    assert update("update_size=128", "accumulation_steps=4", "data_parallel=2") == (16, 4, 1.5)


def test_max_delay_alone_refuses_and_says_what_would_choose() -> None:
    assert update("max_delay=3", "accumulation_steps=2") == (64, 2, 3.0)
    assert update("max_delay=3", "method=backprop") == (64, 1, 0.0)
    assert refusal("max_delay=2.5") == (
        "max_delay=2.5, but D_0 = 6 updates with stages=4 and accumulation_steps=1: set update_size=64 too, so that "
        "both choose accumulation_steps and batch_size, or set accumulation_steps=3"
    )


@pytest.mark.parametrize("also", [[], ["update_size=64"]])
def test_no_delay_at_all_is_refused_where_there_is_one(also: list[str]) -> None:
    assert refusal("max_delay=0", *also).startswith("max_delay=0: with stages=4, gradients of method=petra are late")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*BOTH, "batch_size=32"], "update_size=64 and max_delay=3 choose batch_size and accumulation_steps, but "
         "batch_size=32 is set: leave batch_size out, or set update_size=null"),
        (["grad_accum_steps=2", *BOTH], "update_size=64 and max_delay=3 choose batch_size and accumulation_steps, but "
         "accumulation_steps=2 is set: leave accumulation_steps out, or set max_delay=null"),
        (["batch_size=32", "update_size=64"], "update_size=64 chooses batch_size, but batch_size=32 is set: leave "
         "batch_size out, or set update_size=null"),
        (["update_size=64", "accumulation_steps=3"], "update_size=64 cannot be shared out evenly over "
         "accumulation_steps=3 x data_parallel=1; nearest: 63 or 66"),
        (["update_size=2", "data_parallel=3"], "update_size=2 cannot be shared out evenly over accumulation_steps=1 x "
         "data_parallel=3; nearest: 3"),
        (["update_size=8", "max_delay=0.5", "stages=14"], "update_size=8 is too small for max_delay=0.5 with "
         "stages=14: single images as micro-batches would still be too late; nearest: update_size=52 or stages=3 or "
         "max_delay=3.25"),
        (["max_delay=-1"], "max_delay=-1: expected greater than or equal to 0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused_in_one_line(overrides: list[str], message: str) -> None:
    assert refusal(*overrides) == message


def test_what_is_said_to_be_nearest_works() -> None:
    for setting in nearest_choices(64, 0.5, 14, 2, smallest=8).split(" or "):
        recipe = load_recipe(SHAPES, ["update_size=64", "max_delay=0.5", "stages=14", "data_parallel=2", setting])
        assert recipe.batch_size >= 8, setting


@pytest.mark.parametrize(("batch_size", "images"), [(128, "the same"), (16, "more")])
def test_what_the_warning_advises_leaves_batch_norm_enough_images(batch_size: int, images: str) -> None:
    late = load_recipe(SHAPES, ["stages=14", f"batch_size={batch_size}"])
    found = re.search(r"at (.*) images per update \((.*?)\)", advice(late))
    assert found is not None
    better = override_recipe(late, found[2].split())
    assert found[1] == images
    assert (better.batch_size >= SMALLEST_FOR_BATCH_NORM, better.delay[0] <= border(late.opt)) == (True, True)


def test_on_the_command_line_they_take_the_place_of_what_a_recipe_says(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(f"extends: {SHAPES}\naccumulation_steps: 4\n")
    assert update(*BOTH, name=str(own)) == (32, 2, 3.0)
    assert update("update_size=64", name=str(own)) == (16, 4, 1.5), "with update_size alone, k is the recipe's"
    own.write_text(f"extends: {SHAPES}\nmax_delay: 6\n")
    assert update("update_size=32", name=str(own)) == (32, 1, 6.0), "one may come from the file"


def test_what_a_recipe_chooses_by_can_be_taken_back(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(f"extends: {SHAPES}\nupdate_size: 64\nmax_delay: 3\n")
    assert update(name=str(own)) == (32, 2, 3.0)
    assert update("batch_size=16", "accumulation_steps=8", "max_delay=null", name=str(own)) == (16, 8, 0.75)
    assert update("max_delay=null", "accumulation_steps=1", name=str(own)) == (64, 1, 6.0)
    assert update("update_size=null", "max_delay=null", "batch_size=16", name=str(own)) == (16, 1, 6.0)
    refused = refusal("accumulation_steps=4", "max_delay=3", name=str(own))
    assert "leave accumulation_steps out, or set max_delay=null" in refused


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["batch_size=16"], (16, 1, 6.0)),
        (["accumulation_steps=4"], (16, 4, 1.5)),
        (["batch_size=16", "accumulation_steps=4"], (16, 4, 1.5)),
        (["update_size=128"], (64, 2, 3.0)),
        (["stages=2"], (64, 1, 2.0)),
    ],
)
def test_whoever_says_what_a_recipe_chooses_does_without_the_choice(
    tmp_path: Path, overrides: list[str], expected: tuple[int, int, float]
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(f"extends: {SHAPES}\nupdate_size: 64\nmax_delay: 3\n")
    assert update(*overrides, name=str(own)) == expected


def test_a_saved_recipe_gives_the_same_run_and_chooses_anew_where_it_is_changed(tmp_path: Path) -> None:
    recipe = load_recipe(SHAPES, BOTH)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    again = load_recipe(str(tmp_path / "recipe.yaml"))
    assert again == recipe == Recipe(**recipe.model_dump())
    assert (again.batch_size, again.accumulation_steps) == (32, 2)
    assert update("stages=8", name=str(tmp_path / "recipe.yaml")) == (8, 8, 1.75)
    assert override_recipe(recipe, ["stages=8"]).accumulation_steps == 8


def test_a_recipe_on_paper_says_what_follows() -> None:
    lines = recipe_yaml(load_recipe(SHAPES, BOTH)).splitlines()
    assert "batch_size: null  # 32, by update_size and max_delay" in lines
    assert "accumulation_steps: null  # 2, by update_size and max_delay" in lines
    assert "batch_size: null  # 64, by update_size" in recipe_yaml(load_recipe(SHAPES, ["update_size=64"]))
    assert "batch_size: 64\n" in recipe_yaml(load_recipe(SHAPES))


def test_the_learning_rate_goes_by_the_update_not_by_how_it_is_cut() -> None:
    for more in ([], ["max_delay=1"]):
        assert load_recipe(SHAPES, ["update_size=128", *more]).learning_rate == pytest.approx(0.2)


@pytest.mark.parametrize("setting", ["stages=999999999", "stages=1000000000000", "update_size=1000000000000"])
def test_numbers_beyond_all_use_are_refused_at_once(setting: str) -> None:
    with pytest.raises(UserError, match="expected"):
        load_recipe("digits/petra_revnet_tiny", [setting])


def test_an_update_of_many_images_is_cut_at_once() -> None:
    assert load_recipe("digits/petra_revnet_tiny", ["update_size=999999998"]).accumulation_steps == 2
