"""What others add to the zoo: installed packages by entry points, a user's own module by --import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from petra_zoo import extensions
from petra_zoo.errors import UserError
from petra_zoo.registry import Registry

# Registers a model, and uses rooms of ours that import timm themselves.
NETWORK = """
import timm
from timm.models import register_model
from petra_zoo.data import datasets
from petra_zoo.petra import Pipeline

@register_model
def mynet_tiny(pretrained=False, **kwargs):
    \"\"\"A network of mine.\"\"\"
    return timm.create_model("petra_revnet_tiny", pretrained=pretrained, **kwargs)
"""


def distribution(folder: Path, name: str, entry_points: str, **modules: str) -> None:
    """An installed package, as importlib.metadata finds it."""
    info = folder / f"{name}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(entry_points)
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)


def python(*arguments: object, folder: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=folder, env=environment)


@pytest.mark.parametrize(
    "first", ["petra_zoo, timm", pytest.param("petra_zoo.data.datasets, timm", marks=pytest.mark.slow)]
)
def test_models_of_installed_packages_come_with_ours(tmp_path: Path, first: str) -> None:
    distribution(tmp_path, "mynet", "[petra_zoo.models]\nmynet = mynet_models\n", mynet_models=NETWORK)
    distribution(tmp_path, "broken", "[petra_zoo.models]\nnet = broken_models\n", broken_models="import nowhere")
    done = python("-c", f"import {first}; timm.create_model('mynet_tiny')", folder=tmp_path, path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == (
        "broken 1.2 is left out: its entry point net = broken_models of petra_zoo.models raises "
        "ModuleNotFoundError: No module named 'nowhere'\n"
    )


def test_entry_points_are_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = "import petra_zoo.extensions as e\ne.counted = getattr(e, 'counted', 0) + 1\ne.load_entry_points('some')\n"
    distribution(tmp_path, "counting", "[some]\na = counting_module\n", counting_module=count)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(extensions, "counted", 0, raising=False)
    for _ in range(2):
        extensions.load_entry_points("some")
        sys.modules.pop("counting_module", None)
    assert vars(extensions)["counted"] == 1


def test_an_installed_package_cannot_end_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    distribution(tmp_path, "leaving", "[leavers]\na = leaving_module\n", leaving_module="raise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    extensions.load_entry_points("leavers")
    assert caplog.messages == [
        "leaving 1.2 is left out: its entry point a = leaving_module of leavers raises SystemExit: 3"
    ]


def test_a_registry_has_what_installed_packages_add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    things: Registry[int] = Registry("thing", "petra_zoo.things")
    monkeypatch.setattr(extensions, "things", things, raising=False)
    add = "from petra_zoo.extensions import things\nthings.add('seven', 7)\n"
    distribution(tmp_path, "seven", "[petra_zoo.things]\nseven = seven_things\n", seven_things=add)
    monkeypatch.syspath_prepend(tmp_path)
    assert things.find("seven") == 7


def test_the_command_line_imports_a_module_of_the_current_directory(tmp_path: Path) -> None:
    (tmp_path / "mymod.py").write_text(NETWORK)
    done = python("-m", "petra_zoo", "--import", "mymod", "list", "mynet*", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "mynet_tiny\n"), done.stderr


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(extensions, "_imported", [])
    return tmp_path


def test_other_processes_get_the_same_modules(imported: Path) -> None:
    (imported / "mine_a.py").write_text("")
    (imported / "mine_b.py").write_text("")
    extensions.import_modules(["mine_a", "mine_b", "mine_a"])
    assert extensions.import_options() == ["--import", "mine_a", "--import", "mine_b"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine_none", "--import mine_none: there is no module mine_none, neither installed nor in"),
        ("mine_none.models", "there is no module mine_none"),
        ("mine_needy", "--import mine_needy: it imports nowhere, which is not installed"),
        ("mine_empty.py", "--import mine_empty.py: expected a module, not a file: --import mine_empty"),
        ("./mine_empty.py", "expected a module as Python's import takes it"),
        ("", "expected a module as Python's import takes it"),
    ],
)
def test_a_module_that_is_not_there_is_a_users_mistake(name: str, message: str, imported: Path) -> None:
    (imported / "mine_needy.py").write_text("import nowhere")
    (imported / "mine_empty.py").write_text("")
    with pytest.raises(UserError, match=message):
        extensions.import_modules([name])
    assert extensions.import_options() == []


def test_an_error_in_ones_own_module_is_shown_where_it_is(imported: Path) -> None:
    (imported / "mine_wrong.py").write_text("1 / 0")
    with pytest.raises(ZeroDivisionError):
        extensions.import_modules(["mine_wrong"])
