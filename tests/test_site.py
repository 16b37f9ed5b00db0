"""The documentation site: no page is missing, and it is built without a warning."""

import importlib.util
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_every_page_is_in_the_sidebar() -> None:
    entries = [entry for pages in runpy.run_path(str(ROOT / "docs" / "conf.py"))["SIDEBAR"].values() for entry in pages]
    found = {path for entry in entries for path in ROOT.glob(f"{entry}.md")}
    pages = {*ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/README.md"), ROOT / "CONTRIBUTING.md"}
    assert not pages - found
    assert all(list(ROOT.glob(f"{entry}.md")) for entry in entries), "an entry without a page"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(importlib.util.find_spec("sphinx") is None, reason="Sphinx is not installed: make docs does it")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "-c", "docs"]
    done = subprocess.run(
        [*command, "-d", str(tmp_path / "doctrees"), ".", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "petra_zoo.petra.GraphedStep" in (tmp_path / "site" / "docs" / "api.html").read_text(encoding="utf-8")
    assert (tmp_path / "site" / "index.html").is_file()
