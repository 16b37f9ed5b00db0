"""Puts what sweep.py and gradients.py found into a results file, whose tables docs/families.md shows.

python benchmarks/families/collect.py runs/families benchmarks/families/results.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import timm

from petra_zoo.bench.results import Record, Results
from petra_zoo.machine import describe_machine, describe_versions, now

COMMAND = "python benchmarks/families/{}.py"


def main(folder: Path, output: Path) -> None:
    timms = {module: timm.list_models(module=module) for module in timm.list_modules()}
    names = {module: len(found) for module, found in timms.items() if found and not found[0].startswith("petra_")}
    results = Results("families", "families", {"names": names})
    facts = {"machine": describe_machine(), "versions": describe_versions(), "date": now()}
    for path in sorted(folder.glob("chains*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            found = json.loads(line)
            name, error = found.pop("name"), found.pop("error", None)
            result = {"family": found["family"], "failed": error} if error else found
            results.add(Record(name, 0, {"of": "network"}, COMMAND.format("sweep"), result, **facts))
    if (checked := folder / "gradients.json").exists():
        for block, found in json.loads(checked.read_text(encoding="utf-8")).items():
            result = {"failed": found["error"]} if "error" in found else {"difference": found["difference"]}
            of = {"of": "block", "network": found["name"], "path": found["path"]}
            results.add(Record(block, 0, of, COMMAND.format("gradients"), result, **facts))
    results.write(output)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
