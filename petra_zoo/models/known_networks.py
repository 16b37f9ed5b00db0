"""What is known of the zoo's networks without building them: a table beside this file, for lists of them all.

    python -m petra_zoo.models.known_networks

writes it anew, in some minutes. It holds for the version of timm that it was made with: with another one, and for
networks that it does not have, networks are built (`describe.py`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import cache
from importlib import resources
from pathlib import Path

import timm

from petra_zoo.files import write_whole
from petra_zoo.models.describe import Description, describe_registered, summary_of, zoo_names
from petra_zoo.strict_json import JsonObject, to_json

TABLE = "known_networks.json"


def describe_known(name: str) -> Description:
    """A registered network as `describe_registered` describes it, out of the table where it is there.

    Raises:
        UserError: no such network; names the nearest.
    """
    known = _known().get(name)
    return replace(known, summary=summary_of(name)) if known else describe_registered(name)


@cache
def _known() -> dict[str, Description]:
    """The table, without the networks' summaries; nothing where it was made with another version of timm."""
    table = json.loads(resources.files("petra_zoo.models").joinpath(TABLE).read_text(encoding="utf-8"))
    rows = table["networks"] if table["timm"] == timm.__version__ else {}
    return {
        name: Description(name=name, summary="", **{**row, "input_size": tuple(row["input_size"])})
        for name, row in rows.items()
    }


def write_table(path: Path) -> None:
    """Builds every network of the zoo's own and writes what is known of it."""
    names = [name for name in zoo_names() if timm.model_entrypoint(name).__module__.startswith("petra_zoo.")]
    rows = ",\n".join(f"{to_json(name)}: {to_json(_row(describe_registered(name)))}" for name in names)
    write_whole(path, f'{{"timm": {to_json(timm.__version__)}, "networks": {{\n{rows}\n}}}}\n')


def _row(described: Description) -> JsonObject:
    row = asdict(described)
    del row["name"], row["summary"]
    return row


if __name__ == "__main__":
    write_table(Path(__file__).with_name(TABLE))
