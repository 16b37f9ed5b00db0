"""Recipes: what can be said, what is refused and how, and that what is saved comes back."""

import re
from pathlib import Path

import pytest
import yaml

import petra_zoo
from petra_zoo.errors import UserError
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.recipe_files import list_recipes, load_recipe, make_recipe, save_recipe

DIGITS = "digits/petra_revnet_tiny"


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(DIGITS, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_installed_recipes_are_listed_and_all_of_them_load() -> None:
    assert DIGITS in list_recipes()
    for name in list_recipes():
        data, _, model = name.partition("/")
        recipe = load_recipe(name)
        if data not in ("finetune", "folder"):  # named for what they are for
            assert (recipe.dataset, recipe.model) == (
                {"imagenet": "folder"}.get(data, data),
                model.removesuffix("_muon"),
            )


def test_an_optimizers_option_with_a_setting_of_its_own_is_sent_there() -> None:
    assert refusal("opt_kwargs={momentum: .5}") == (
        "opt_kwargs={'momentum': 0.5}: momentum is a setting of its own: take it out, and say momentum=0.5"
    )


def test_a_file_is_read_by_its_path(tmp_path: Path) -> None:
    path = write(tmp_path / "own.yaml", "model: petra_revnet18\ndataset: shapes\n")
    assert load_recipe(path).model == "petra_revnet18"


def test_overrides_are_typed_and_the_later_one_wins() -> None:
    recipe = load_recipe(
        DIGITS, ["lr=1e-4", "epochs=3", "split=[1, 2, 3, 4]", "amp=true", "data_dir=/data", "lr=1e-3", "aa=null"]
    )
    assert recipe.lr == 1e-3  # a string to YAML, which wants 1.0e-3
    assert (recipe.epochs, recipe.split, recipe.amp) == (3, [1, 2, 3, 4], True)
    assert recipe.data_dir == Path("/data")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-8", 1e-8),
        ("5e-1", 0.5),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-1.e+2", -100.0),
        ("-.inf", float("-inf")),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2026-01-01", "2026-01-01"),
        ("'1e-8'", "1e-8"),
        ("true", True),
        ("~", None),
    ],
)
def test_numbers_are_those_of_yaml_1_2_in_overrides_and_in_files(tmp_path: Path, text: str, value: object) -> None:
    path = write(tmp_path / "own.yaml", f"model: m\ndataset: shapes\nopt_kwargs: {{a: {text}, b: [{text}]}}\n")
    for recipe in (load_recipe(path), load_recipe(DIGITS, [f"opt_kwargs={{a: {text}, b: [{text}]}}"])):
        assert recipe.opt_kwargs == {"a": value, "b": [value]}
        assert type(recipe.opt_kwargs["a"]) is type(value)


def test_a_leading_zero_is_no_octal_number() -> None:
    assert load_recipe(DIGITS, ["seed=010"]).seed == 10


@pytest.mark.parametrize("text", ["1e-8", "010", "1_000", "0o10", "2026-01-01", "1:30", "yes", "null"])
def test_text_that_looks_like_a_number_stays_text_when_a_recipe_is_saved(tmp_path: Path, text: str) -> None:
    recipe = make_recipe({"model": "m", "dataset": "shapes", "opt_kwargs": {"a": text, "b": 1e-8, "c": 1e17}})
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(str(tmp_path / "saved.yaml")) == recipe
    older = yaml.safe_load((tmp_path / "saved.yaml").read_text())  # a reader of YAML 1.1
    assert older["opt_kwargs"] == recipe.opt_kwargs


def test_off_is_a_word_where_a_setting_has_it(tmp_path: Path) -> None:
    """To YAML it is a truth value, so that it reaches a recipe as false."""
    recipe = load_recipe(DIGITS, ["cuda_graphs=off"])
    assert recipe.cuda_graphs == "off"
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(str(tmp_path / "saved.yaml")) == recipe
    assert "neither on nor off" in refusal("cuda_graphs=on")


def test_a_home_is_expanded_in_every_setting_that_names_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    places = {name for name, field in Recipe.model_fields.items() if "Path" in str(field.annotation)}
    assert places == {"data_dir", "profile", "output"}
    recipe = load_recipe(DIGITS, [f"{name}=~/x" for name in sorted(places | {"pretrained", "kd_model_name"})])
    assert {str(getattr(recipe, name)) for name in places} == {"/home/me/x"}
    assert (recipe.pretrained, recipe.kd_model_name) == ("/home/me/x", "/home/me/x")
    assert load_recipe(DIGITS, ["pretrained=local-dir:~/x"]).pretrained == "local-dir:/home/me/x"


def test_a_mapping_can_be_overridden() -> None:
    assert load_recipe(DIGITS, ["model_kwargs={coupling: 0.5}"]).model_kwargs == {"coupling": 0.5}


def test_timms_name_for_accumulation_replaces_ours(tmp_path: Path) -> None:
    path = write(tmp_path / "own.yaml", "model: m\ndataset: shapes\naccumulation_steps: 2\n")
    assert load_recipe(path, ["grad_accum_steps=4"]).accumulation_steps == 4


def test_unknown_recipe_gives_the_nearest() -> None:
    with pytest.raises(UserError, match=f"unknown recipe 'digit/petra_revnet_tiny'; did you mean '{DIGITS}'"):
        load_recipe("digit/petra_revnet_tiny")


def test_the_directory_of_a_run_is_told_from_its_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: x")
    with pytest.raises(UserError, match=r"is the directory of a run; its recipe is .*/recipe\.yaml$"):
        load_recipe(str(tmp_path))


def test_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"recipe file nowhere\.yaml cannot be read"):
        load_recipe("nowhere.yaml")


def test_unknown_setting_gives_the_nearest() -> None:
    assert refusal("epoch=3") == "unknown setting 'epoch'; did you mean 'epochs'?"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr=-1", "lr=-1: expected greater than 0"),
        ("lr=.inf", "lr=inf: expected a finite number"),
        ("lr=fast", "lr='fast': expected a valid number, unable to parse string as a number"),
        ("stages=0", "stages=0: expected greater than or equal to 1"),
        ("batch_size=1.5", "batch_size=1.5: expected a valid integer, got a number with a fractional part"),
        ("method=petr", "method='petr': unknown method 'petr'; did you mean petra?"),
        ("opt_betas=[0.9]", "opt_betas=[0.9]: entry 1: required, but not given"),
        ("decay_milestones=[1,x]", "decay_milestones=[1, 'x']: entry 1: expected a valid integer, unable to parse "
         "string as an integer"),
        ("scale=3", "scale=3: expected a list"),
        ("data_dir=5", "data_dir=5: expected a path"),
        ("device=gpu", "device='gpu': expected auto, cpu, cuda, cuda:N or mps"),
        ("device=mps", "device=mps is for the exact methods alone: set method=backprop or reversible"),
        ("opt=sdg", "opt='sdg': expected an optimizer that timm.optim.list_optimizers() names, such as sgd or adamw"),
        ("mean=[0.5]", "mean=[0.5] has 1 values; expected one per channel, 3"),
        ("std=[1,1,0]", "std=[1, 1, 0]: entry 2: expected greater than 0"),
        ("split=[1,2]", "split=[1, 2] has 2 entries; expected one per stage, stages=4"),
        ("epochs", "override 'epochs' is not KEY=VALUE, such as lr=0.1"),
        ("amp_dtype=float16", "amp_dtype=float16 has no effect without autocast: set amp=true, too"),
        ("resume=never", "resume=never: that is an option, and no setting: --resume never"),
        ("max_time=1h", "max_time=1h: that is an option, and no setting: --max-time 1h"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_in_one_line(override: str, message: str) -> None:
    assert refusal(override) == message


def test_broken_yaml_in_an_override_is_one_line() -> None:
    assert refusal("split=[1").startswith("override 'split=[1': the value is not valid YAML")


def test_several_wrong_values_are_all_named() -> None:
    assert refusal("lr=-1", "stages=0") == (
        "stages=0: expected greater than or equal to 1; lr=-1: expected greater than 0"
    )


def test_what_is_required_is_named() -> None:
    with pytest.raises(UserError, match=r"^model: required, but not given; dataset: required, but not given$"):
        make_recipe({})


@pytest.mark.parametrize(
    ("text", "message"),
    [("- model", "is not a YAML mapping"), ("", "is not a YAML mapping"), ("model: [", "is not valid YAML")],
)
def test_a_file_that_is_no_mapping_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "bad.yaml", text)
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_lr_base_scales_with_the_images_per_update() -> None:
    recipe = load_recipe(DIGITS, ["lr=null", "lr_base=0.2", "lr_base_size=128", "batch_size=32", "grad_accum_steps=8"])
    assert recipe.learning_rate == pytest.approx(0.4)
    assert load_recipe(DIGITS, ["lr=0.3"]).learning_rate == 0.3
    assert load_recipe(DIGITS, ["lr=null", "batch_size=256"]).learning_rate == pytest.approx(0.1)


def test_an_override_of_lr_replaces_the_recipes_lr_base() -> None:
    paper = "cifar10/petra_revnet18_cifar"
    assert load_recipe(paper).lr_base is not None
    assert load_recipe(paper, ["lr=0.3"]).lr_base is None
    assert load_recipe(paper, ["lr=0.3", "lr_base=0.2"]).lr is None


def test_both_lr_and_lr_base_in_one_recipe_are_refused() -> None:
    with pytest.raises(UserError, match="lr and lr_base are both set; set one of them to null"):
        make_recipe({"model": "petra_revnet_tiny", "dataset": "digits", "lr": 0.1, "lr_base": 0.1})


def test_a_saved_recipe_comes_back_equal_with_the_network_first(tmp_path: Path) -> None:
    recipe = load_recipe(DIGITS, ["scale=[0.5, 1]", "data_dir=/data", "opt_betas=[0.9, 0.99]", "opt_kwargs={a: 1}"])
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(str(tmp_path / "saved.yaml")) == recipe
    assert (tmp_path / "saved.yaml").read_text().startswith("model: petra_revnet_tiny\n")


def test_every_setting_has_a_default_but_model_and_dataset() -> None:
    required = [name for name, field in Recipe.model_fields.items() if field.is_required()]
    assert required == ["model", "dataset"]


def test_every_setting_is_read_somewhere() -> None:
    package = Path(petra_zoo.__file__).parent
    own = [package / "settings" / f"{name}.py" for name in ("augmentation", "recipe")]
    read = "".join(path.read_text() for path in package.rglob("*.py") if path not in own)
    settings = "".join(path.read_text() for path in own)
    for name in Recipe.model_fields:
        assert re.search(rf"\.{name}\b", read) or f"self.{name}" in settings, name


@pytest.mark.parametrize("value", ["!!int x", "!!float x"])
def test_a_value_that_is_not_what_its_yaml_tag_says_is_refused(value: str) -> None:
    with pytest.raises(UserError, match=r"^override 'lr=.*: the value is not valid YAML"):
        load_recipe(DIGITS, [f"lr={value}"])


@pytest.mark.parametrize("override", ["lr=yes", "epochs=true", "num_classes=on"])
def test_a_word_for_truth_is_no_number(override: str) -> None:
    with pytest.raises(UserError, match="neither on nor off"):
        load_recipe("digits/petra_revnet_tiny", [override])


@pytest.mark.parametrize("text", ["lr: 0.1\nepochs: 2\nlr: 0.2\n", "opt_kwargs: {eps: 1, eps: 2}\n"])
def test_a_setting_that_stands_twice_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(UserError, match="stands twice"):
        load_recipe(str(tmp_path / "own.yaml"))


def test_compiled_branches_and_synchronised_norms_exclude_each_other() -> None:
    assert "compile and sync_bn are both set" in refusal("compile=true", "sync_bn=true")
