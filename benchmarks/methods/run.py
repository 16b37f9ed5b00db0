"""Test accuracy of every method on `digits` and `shapes` with the tiny network, paired seeds.

    python benchmarks/methods/run.py --jobs 2   # all of it: about an hour on two cores
    python benchmarks/methods/run.py --table    # the table from results.json

Each run is a process of its own with one thread, through the command line a user would type. A run that stands in
results.json already is not repeated, so an interrupted benchmark goes on where it stopped. The learning rate follows
the recipe's linear rule in the images per update (lr_base), so k = 4 has four times the rate of k = 1; the exact
control with k = 4 is there to tell the effect of the batch from the effect of the delay.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch

RESULTS = Path(__file__).with_name("results.json")
TABLE = Path(__file__).with_name("README.md")
SEEDS = (0, 1, 2)
DATASETS = {
    "digits": ["digits/petra_revnet_tiny"],
    "shapes": [
        "shapes/petra_revnet_tiny",
        "channels_last=true",
        "img_size=16",
        "crop_padding=2",
        "epochs=8",
        "warmup_epochs=1",
        "workers=0",
    ],
}
METHODS = {
    "backprop": ["method=backprop"],
    "backprop, k = 4": ["method=backprop", "accumulation_steps=4"],
    "reversible": ["method=reversible"],
    "petra": ["method=petra"],
    "petra, k = 4": ["method=petra", "accumulation_steps=4"],
    "dsp": ["method=dsp"],
    "delayed": ["method=delayed"],
    "local": ["method=local"],
}


def train(dataset: str, method: str, seed: int) -> dict[str, Any]:
    """Runs one training in a process of its own; gives its accuracy and time."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        recipe, *overrides = DATASETS[dataset]
        settings = [*overrides, *METHODS[method], "stages=4", f"seed={seed}", "val_interval=1000", f"output={run}"]
        command = [sys.executable, "-m", "petra_zoo", "train", recipe, *settings]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    shown = [setting for setting in settings if not setting.startswith("output=")]
    return {
        "dataset": dataset,
        "method": method,
        "seed": seed,
        "top1": last["top1"],
        "loss": last["loss"],
        "command": f"petra-zoo train {recipe} {' '.join(shown)}",
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and range over the seeds, in Markdown."""
    lines = ["| method | " + " | ".join(DATASETS) + " |", "|---" * (len(DATASETS) + 1) + "|"]
    for method in METHODS:
        cells = []
        for dataset in DATASETS:
            found = [row["top1"] for row in rows if row["method"] == method and row["dataset"] == dataset]
            cells.append(f"{statistics.mean(found):.2f} ({min(found):.2f} to {max(found):.2f})" if found else "-")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one core each")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": []}
    if not arguments.table:
        results["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, one thread per run"
        results["versions"] = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
        }
        done = {(row["dataset"], row["method"], row["seed"]) for row in results["runs"]}
        todo = [key for key in product(DATASETS, METHODS, SEEDS) if key not in done]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for finished in as_completed([pool.submit(train, *key) for key in sorted(todo, key=lambda key: key[2])]):
                results["runs"].append(finished.result())
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                print(results["runs"][-1], flush=True)
    print(table(results["runs"]))


if __name__ == "__main__":
    main()
