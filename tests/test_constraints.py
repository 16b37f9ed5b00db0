"""The versions that are tested at the low end (`make test-oldest`) are those that pyproject.toml declares."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def pinned(name: str) -> dict[str, str]:
    rows = [Requirement(line) for line in (ROOT / name).read_text().splitlines() if line]
    return {canonicalize_name(row.name): str(row.specifier).removeprefix("==") for row in rows}


def test_the_oldest_constraints_pin_every_declared_minimum() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tools = {"dev", "docs"}  # of those who work on the package: no test runs with them
    extras = {name: rows for name, rows in project["optional-dependencies"].items() if name not in tools}
    declared = [Requirement(row) for rows in (project["dependencies"], *extras.values()) for row in rows]
    minima = {canonicalize_name(row.name): str(row.specifier).removeprefix(">=") for row in declared if row.specifier}
    oldest = pinned("constraints-oldest.txt")
    assert len(minima) > 20
    assert {name: low for name, low in minima.items() if not f"{oldest.get(name)}.".startswith(f"{low}.")} == {}
