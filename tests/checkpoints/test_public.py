"""What is published says what things are called, not where they lie on the machine that made them."""

import json
from pathlib import Path

import pytest
import yaml

from petra_zoo.checkpoints.public import public_dataset, public_source, without_places
from petra_zoo.converters import CoupledRun, Fidelity
from petra_zoo.converters.report import ConversionReport, write_report
from petra_zoo.hub.card import hub_id
from petra_zoo.hub.checkpoint import read_checkpoint
from petra_zoo.hub.repository import Files, read, repository_files
from petra_zoo.models.training_memory import StepBytes
from petra_zoo.settings.recipe_files import load_recipe, save_recipe
from tests.hub.checkpoints import measure, untrained


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A machine's places, each with a name that says that it is private."""
    home = tmp_path_factory.mktemp("home-of-ada")
    for name in ("start", "teacher", "images", "cache"):
        (home / "secret" / name).mkdir(parents=True)
    (home / "secret" / "costs.json").write_text("{}")
    return home


@pytest.fixture(scope="module")
def published(home: Path) -> Files:
    """A checkpoint that knows as many places of the machine as there are."""
    secret, path = home / "secret", untrained(home / "run")
    settings = [f"pretrained={secret / 'start'}", f"kd_model_name=local-dir:{secret / 'teacher'}", "dataset=folder"]
    settings += [f"data_dir={secret / 'images'}", f"profile={secret / 'costs.json'}", f"output={path}"]
    recipe = load_recipe("digits/petra_revnet_tiny", [*settings, f"model_kwargs={{cache_dir: {secret / 'cache'}}}"])
    save_recipe(recipe, path / "recipe.yaml")
    measure(path, dataset=f"hfds/{secret / 'images'}")
    same = Fidelity(64, 98.0, 0.01, 0.002, None, None, [CoupledRun("layer1", 3, 0.25, 0, 1e-6)])
    memory = {"source": StepBytes(2**20, 2**21)}
    report = ConversionReport(
        str(secret / "resnet18.pth"), str(path), f"hfds/{secret / 'images'}", 1e-4, same, (3, 8, 8), memory
    )
    write_report(report, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "trained_from": str(secret / "start")}))
    return repository_files(read_checkpoint(path), "hf-hub:owner/tiny", license="mit")


def test_no_place_of_the_machine_is_published(published: Files, home: Path) -> None:
    names = ("README.md", "config.json", "recipe.yaml", "fidelity.json", "fidelity.md")
    assert set(names) <= set(published)
    told = [name for name, content in published.items() if str(home).encode() in read(content)]
    assert told == []
    assert [name for name, content in published.items() if b"/secret" in read(content)] == []


def test_what_it_came_from_is_still_said(published: Files) -> None:
    recipe = yaml.safe_load(read(published["recipe.yaml"]))
    assert (recipe["pretrained"], recipe["kd_model_name"]) == ("local-dir:start", "local-dir:teacher")
    assert (recipe["profile"], recipe["data_dir"], recipe["output"]) == (None, None, None)
    assert json.loads(read(published["fidelity.json"]))["source"] == "resnet18.pth"
    assert json.loads(read(published["config.json"]))["trained_from"] == "local-dir:start"
    assert "`resnet18.pth`" in read(published["fidelity.md"]).decode()


def test_a_published_recipe_is_a_recipe(published: Files, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(read(published["recipe.yaml"]))
    assert load_recipe(str(tmp_path / "recipe.yaml")).pretrained == "local-dir:start"


def test_a_local_data_set_is_not_taken_for_one_of_the_hub(published: Files) -> None:
    assert not [name for name in published if name.startswith(".eval_results")]
    assert hub_id("hfds//home/ada/images") is None
    assert "hfds/images" in read(published["README.md"]).decode()


def test_a_local_file_is_not_taken_for_weights_of_timm(published: Files) -> None:
    assert "base_model" not in read(published["README.md"]).decode()


@pytest.mark.parametrize(
    ("source", "public"),
    [
        ("resnet18.a1_in1k", "resnet18.a1_in1k"),
        ("digits", "digits"),
        ("hf-hub:owner/net@main", "hf-hub:owner/net@main"),
        ("torchvision:resnet50.IMAGENET1K_V2", "torchvision:resnet50.IMAGENET1K_V2"),
        ("weights.pth", "weights.pth"),
        ("/home/ada/weights.pth.tar", "weights.pth.tar"),
        ("../ada/run/", "local-dir:run"),
        ("~/run", "local-dir:run"),
        ("local-dir:runs/digits", "local-dir:digits"),
        (r"C:\Users\ada\run", "local-dir:run"),
        ("..", "local-dir:checkpoint"),
    ],
)
def test_a_source_keeps_its_name_and_loses_its_place(source: str, public: str) -> None:
    assert public_source(source) == public


@pytest.mark.parametrize(
    ("dataset", "public"),
    [
        ("digits", "digits"),
        ("synthetic:4x8x128", "synthetic:4x8x128"),
        ("torch/mnist", "torch/mnist"),
        ("hfds/owner/images", "hfds/owner/images"),
        ("hfds//home/ada/images", "hfds/images"),
        ("hfds/../ada/images", "hfds/images"),
    ],
)
def test_a_data_set_keeps_its_name_and_loses_its_place(dataset: str, public: str) -> None:
    assert public_dataset(dataset) == public


def test_labels_that_look_like_paths_stay() -> None:
    labels = {"label_names": ["/m/01g317", "/m/09j2d"]}
    assert without_places(labels) == labels
