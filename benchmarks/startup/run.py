"""How long the command line takes to start, relative to `import torch` and `import timm` on the same machine.

    python benchmarks/startup/run.py                              # 5 rounds: about a minute and a half
    python benchmarks/startup/run.py --before OTHER/bin/python    # beside another installation, in the same rounds
    python benchmarks/startup/run.py --table                      # README.md from results.json

Every round runs every command once, each in a process of its own, so that a busy minute meets all of them; a first
round that only warms the disk's cache is not counted. Times are medians; a ratio is one of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

RESULTS, README = (Path(__file__).with_name(name) for name in ("results.json", "README.md"))
COMPLETION = {"_PETRA_ZOO_COMPLETE": "complete_bash", "COMP_WORDS": "petra-zoo train digits", "COMP_CWORD": "2"}
PROGRAM = "import sys; sys.argv[0] = 'petra-zoo'; from petra_zoo.cli.main import run; run()"
YARDSTICKS = {"import torch": ["-c", "import torch"], "import timm": ["-c", "import timm"]}
COMMANDS = {
    "python": ["-c", "pass"],
    "import petra_zoo": ["-c", "import petra_zoo"],
    **{
        f"petra-zoo {line}": ["-m", "petra_zoo", *line.split()]
        for line in (
            "--help",
            "--version",
            "nonsense",
            "train --nonsense",
            "train --help",
            "recipes ls",
            "recipes ls --json",
            "recipes show digits/petra_revnet_tiny",
            "list",
        )
    },
    "completion of a recipe": ["-c", PROGRAM],
}


def seconds(python: str, arguments: list[str], name: str, folder: str) -> float:
    """One command in a process of its own, its output thrown away."""
    environment = os.environ | (COMPLETION if name.startswith("completion") else {})
    begin = time.perf_counter()
    subprocess.run([python, *arguments], cwd=folder, env=environment, capture_output=True, check=False)
    return time.perf_counter() - begin


def measure(rounds: int, before: str | None) -> dict[str, dict[str, list[float]]]:
    """Seconds of every round, by installation and command."""
    pythons = {"now": sys.executable, **({"before": before} if before else {})}
    jobs = [(label, name) for name in COMMANDS for label in pythons if (label, name) != ("before", "python")]
    jobs = [("now", name) for name in YARDSTICKS] + [job for job in jobs if job != ("before", "completion of a recipe")]
    taken: dict[str, dict[str, list[float]]] = {label: {} for label in pythons}
    with tempfile.TemporaryDirectory() as folder:  # elsewhere: the package in the current directory would come first
        for turn in range(rounds + 1):
            for label, name in jobs:
                spent = seconds(pythons[label], (YARDSTICKS | COMMANDS)[name], name, folder)
                if turn:
                    taken[label].setdefault(name, []).append(round(spent, 3))
            print(f"round {turn} of {rounds} done", file=sys.stderr)
    return taken


def table(result: dict[str, dict[str, list[float]]]) -> str:
    """Medians in seconds and as multiples of the yardsticks'."""
    medians = {label: {name: statistics.median(times) for name, times in row.items()} for label, row in result.items()}
    torch, timm = (medians["now"][name] for name in YARDSTICKS)
    old = medians.get("before", {})
    lines = [
        "| | seconds | of `import torch` | of `import timm` | before, of `import torch` |",
        "|---|---|---|---|---|",
    ]
    for name, value in medians["now"].items():
        was = f"{old[name] / torch:.2f}" if name in old else ""
        lines.append(f"| `{name}` | {value:.2f} | {value / torch:.2f} | {value / timm:.2f} | {was} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", metavar="PYTHON", help="an interpreter with another petra-zoo, run alternately")
    parser.add_argument("--table", action="store_true", help="write README.md from results.json")
    arguments = parser.parse_args()
    if not arguments.table:
        options = ["--rounds", str(arguments.rounds), *(["--before", "PYTHON"] if arguments.before else [])]
        result = {
            "command": shlex.join(["python", "benchmarks/startup/run.py", *options]),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "timm", "typer", "rich", "pydantic")},
            },
            "seconds": measure(arguments.rounds, arguments.before),
        }
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    saved = json.loads(RESULTS.read_text())
    text = README.read_text()
    head, _, rest = text.partition("<!-- table -->\n")
    tail = rest.partition("<!-- end of table -->\n")[2]
    filled = f"{head}<!-- table -->\n{table(saved['seconds'])}\n<!-- end of table -->\n{tail}"
    README.write_text(filled)


if __name__ == "__main__":
    main()
