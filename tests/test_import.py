"""Importing the package: light, in any order with timm, and what goes wrong is said."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import petra_zoo

ROOT = Path(petra_zoo.__file__).parents[1]
HEAVY = {"torch", "timm", "torchvision", "numpy", "huggingface_hub", "safetensors", "PIL", "pydantic", "typer", "rich"}


def python(code: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | environment,
        cwd=ROOT,
    )


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """A timm and a petra_zoo.models that are imported in no time, and register as the real ones do."""
    (tmp_path / "timm/models").mkdir(parents=True)
    (tmp_path / "timm/__init__.py").write_text("from timm.models import create_model\nimport time\ntime.sleep(0.05)\n")
    (tmp_path / "timm/models/__init__.py").write_text(
        "registry = []\n\ndef create_model(name):\n    assert registry.count(name) == 1, registry\n    return name\n"
    )
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/models.py").write_text("import timm\nfrom timm.models import registry\nregistry.append('net')\n")
    return tmp_path


def with_stand_ins(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    start = f"import sys, petra_zoo; OURS = {str(folder / 'ours')!r}; sys.path.insert(0, {str(folder)!r})"
    return python(f"{start}\npetra_zoo.__path__.insert(0, OURS)\n{code}")


def test_importing_the_package_imports_nothing_heavy() -> None:
    done = python("import petra_zoo, sys; dir(petra_zoo); print(*sorted(sys.modules))")
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import petra_zoo, timm; timm.create_model('petra_revnet_tiny')",
        pytest.param("import timm, petra_zoo; timm.create_model('petra_revnet_tiny')", marks=pytest.mark.slow),
    ],
)
def test_models_are_registered_whichever_comes_first(code: str) -> None:
    done = python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import timm; timm.create_model('net')",
        "from timm import create_model; create_model('net')",
        "import timm.models; timm.models.create_model('net')",
        "import petra_zoo.models, timm; timm.create_model('net')",
        "petra_zoo.models; import timm; timm.create_model('net')",
        "import timm, importlib; importlib.reload(timm); timm.create_model('net')",
        # The hook of a package that is imported anew stands beside the one that is there.
        "import importlib; importlib.reload(petra_zoo); petra_zoo.__path__.insert(0, OURS); import timm; "
        "timm.create_model('net')",
        "del sys.modules['petra_zoo'], sys.modules['petra_zoo.registration']; import petra_zoo; "
        "petra_zoo.__path__.insert(0, OURS); import timm; timm.create_model('net')",
        "import timm, importlib.resources as r; assert timm.__loader__ is timm.__spec__.loader; r.files('timm')",
    ],
)
def test_models_are_registered_however_timm_is_imported(code: str, stand_ins: Path) -> None:
    done = with_stand_ins(code, stand_ins)
    assert done.returncode == 0, done.stderr


def test_models_are_registered_whichever_thread_imports_timm(stand_ins: Path) -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
barrier = Barrier(8)
def work(_):
    barrier.wait()
    from timm import create_model
    return create_model('net')
with ThreadPoolExecutor(8) as pool:
    assert list(pool.map(work, range(8))) == ['net'] * 8
"""
    done = with_stand_ins(code, stand_ins)
    assert done.returncode == 0, done.stderr


def test_models_are_registered_while_another_thread_imports_timm(stand_ins: Path) -> None:
    (stand_ins / "timm/__init__.py").write_text(
        "import time, began; began.event.set(); time.sleep(0.3)\nfrom timm.models import create_model\n"
    )
    (stand_ins / "began.py").write_text("import threading\nevent = threading.Event()\n")
    # Whoever asks for a part of timm before timm itself is there would disturb the import under way.
    (stand_ins / "ours/models.py").write_text("import sys\nassert hasattr(sys.modules['timm'], 'create_model')\n")
    code = """
import began, importlib, threading
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != '_Timm']  # as before petra_zoo
thread = threading.Thread(target=importlib.import_module, args=('timm',))
thread.start()
began.event.wait()
petra_zoo.register_with_timm()
thread.join()
"""
    done = with_stand_ins(code, stand_ins)
    assert done.returncode == 0, done.stderr


def test_an_error_of_the_models_is_one_of_importing_timm(stand_ins: Path) -> None:
    (stand_ins / "ours/models.py").write_text("raise RuntimeError('broken models')")
    for code in ("import timm", "try:\n    import timm\nexcept RuntimeError:\n    import timm"):
        assert "RuntimeError: broken models" in with_stand_ins(code, stand_ins).stderr


def test_without_timm_python_says_so() -> None:
    done = python("import petra_zoo; print('imported')\nimport timm", "-S", PYTHONPATH="")  # no installed packages
    assert done.stdout == "imported\n"
    assert "ModuleNotFoundError: No module named 'timm'" in done.stderr


def test_a_finder_that_asks_for_timm_gets_what_python_finds(stand_ins: Path) -> None:
    done = with_stand_ins("from importlib.util import find_spec; print(find_spec('timm').origin)", stand_ins)
    assert done.stdout.strip() == str(stand_ins / "timm/__init__.py")


@pytest.mark.parametrize("name", petra_zoo.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(petra_zoo, name)
    assert name in dir(petra_zoo)


def test_every_room_is_there_whatever_was_imported_before() -> None:
    rooms = [path.parent.name for path in (ROOT / "petra_zoo").glob("*/__init__.py") if path.parent.name != "cli"]
    assert set(petra_zoo._ROOMS) == {*rooms, "converters", "errors"}
    done = python("import petra_zoo; petra_zoo.training.Callback; petra_zoo.errors.UserError")
    assert done.returncode == 0, done.stderr


def test_type_checkers_see_the_public_names_where_they_are() -> None:
    """Laziness needs the table of homes, and type checkers need imports: the two say the same."""
    tree = ast.parse(Path(petra_zoo.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module for node in imports for alias in node.names if node.module != "petra_zoo"}
    assert seen == petra_zoo._HOMES


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'pipelines'"):
        importlib.import_module("petra_zoo").pipelines  # noqa: B018
