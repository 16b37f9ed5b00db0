"""What is known of the zoo's networks without building them: a table beside this file, for lists of them all.

    python -m petra_zoo.models.known_networks

writes it anew, in a quarter of an hour. It holds for the version of timm that it was made with, and its bytes for that
of torch, too: with others, and for networks that it does not have, networks are built (`describe.py`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import cache
from importlib import resources
from pathlib import Path

import timm
import torch

from petra_zoo.files import write_whole
from petra_zoo.models.describe import (
    Description,
    create_meta,
    describe_model,
    describe_registered,
    summary_of,
    zoo_names,
)
from petra_zoo.models.training_memory import ActivationMemory, activation_memory
from petra_zoo.strict_json import JsonObject, to_json

TABLE = "known_networks.json"
BYTES = "activation_bytes_per_image"


def describe_known(name: str) -> Description:
    """A registered network as `describe_registered` describes it, out of the table where it is there.

    Raises:
        UserError: no such network; names the nearest.
    """
    known = _table().get(name)
    return replace(known[0], summary=summary_of(name)) if known else describe_registered(name)


def describe_with_memory(name: str) -> tuple[Description, ActivationMemory]:
    """The same, and what a training step of it stores.

    Raises:
        UserError: no such network; names the nearest.
    """
    _, memory = _table().get(name, (None, None))
    return (describe_known(name), memory) if memory else describe_and_count(name)


def describe_and_count(name: str) -> tuple[Description, ActivationMemory]:
    """The same of a network that is built; takes a second or two."""
    model = create_meta(name)
    described = describe_model(model, name)
    return described, activation_memory(model, described.input_size)


@cache
def _table() -> dict[str, tuple[Description, ActivationMemory | None]]:
    """Without summaries; no networks where another version of timm made it, no bytes where another torch did."""
    table = json.loads(resources.files("petra_zoo.models").joinpath(TABLE).read_text(encoding="utf-8"))
    found = {}
    for name, row in table["networks"].items() if table["timm"] == timm.__version__ else ():
        counted, input_size = row.pop(BYTES), tuple(row.pop("input_size"))
        memory = ActivationMemory(**counted) if table["torch"] == _torch_version() else None
        found[name] = Description(name=name, summary="", input_size=input_size, **row), memory
    return found


def _torch_version() -> str:
    return torch.__version__.partition("+")[0]


def write_table(path: Path) -> None:
    """Builds every network of the zoo's own and writes what is known of it."""
    names = [name for name in zoo_names() if timm.model_entrypoint(name).__module__.startswith("petra_zoo.")]
    rows = ",\n".join(f"{to_json(name)}: {to_json(_row(name))}" for name in names)
    made_with = f'"timm": {to_json(timm.__version__)}, "torch": {to_json(_torch_version())}'
    write_whole(path, f'{{{made_with}, "networks": {{\n{rows}\n}}}}\n')


def _row(name: str) -> JsonObject:
    described, memory = describe_and_count(name)
    row = {**asdict(described), BYTES: memory.as_dict()}
    del row["name"], row["summary"]
    return row


if __name__ == "__main__":
    write_table(Path(__file__).with_name(TABLE))
