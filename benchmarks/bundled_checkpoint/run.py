"""Trains the checkpoint that comes with the package, petra_revnet_tiny.digits, from its recipe over several seeds.

    python benchmarks/bundled_checkpoint/run.py             # about two minutes of one core per seed
    python benchmarks/bundled_checkpoint/run.py --install   # and puts the recipe's own seed into the package

Every run is a process of its own with one thread, through the command line a user would type. The seed that is
bundled is the recipe's, whatever it scores; it is trained twice, and both files must be the same byte for byte. What
counts is the model of the last epoch: nothing is chosen by validation accuracy.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import timm
import torch

from petra_zoo.data.datasets import open_dataset
from petra_zoo.machine import processor
from petra_zoo.models.petra_revnet import DIGITS_WEIGHTS
from petra_zoo.settings.recipe_files import load_recipe

RECIPE = "digits/petra_revnet_tiny"
SEEDS = (0, 1, 2, 3, 4)  # besides the recipe's own
RESULTS = Path(__file__).with_name("results.json")


def train(seed: int, folder: Path) -> dict[str, Any]:
    """One run: its accuracy, the processor's time that it took, and the SHA-256 of its weights in `folder`."""
    command = ["train", RECIPE, f"seed={seed}", "val_interval=1000"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "petra_zoo", *command, f"output={folder}"]
    with subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return {
        "seed": seed,
        "top1": last["top1"],
        "loss": last["loss"],
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
        "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "command": f"petra-zoo {' '.join(command)}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help="copy the weights of the recipe's seed into the package")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    arguments = parser.parse_args()
    recipe = load_recipe(RECIPE)
    bundled, images = recipe.seed, recipe.epochs * len(open_dataset(recipe.dataset, "train"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ThreadPoolExecutor(arguments.jobs) as pool:
            seeds = {f"seed-{seed}": seed for seed in (bundled, *SEEDS)} | {"again": bundled}
            *runs, again = pool.map(lambda name: train(seeds[name], folder / name), seeds)
        accuracies = [run["top1"] for run in runs]
        results = {
            # On another kind of processor, sums are rounded differently.
            "machine": f"{processor()}, {os.cpu_count()} cores, one thread per run",
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
            "command": "python benchmarks/bundled_checkpoint/run.py",
            "recipe": RECIPE,
            "bundled_seed": bundled,
            "sha256": runs[0]["sha256"],
            "identical_when_trained_again": again["sha256"] == runs[0]["sha256"],
            "top1_mean": statistics.mean(accuracies),
            "top1_standard_deviation": statistics.stdev(accuracies),
            "top1_range": [min(accuracies), max(accuracies)],
            # Of one core to itself, validation and start included: others may have had the machine's cores, too.
            "images_per_processor_second": images / statistics.mean(run["processor_seconds"] for run in runs),
            "runs": runs,
        }
        if not results["identical_when_trained_again"]:
            sys.exit(f"two trainings with seed {bundled} gave different weights: nothing was written")
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        if arguments.install:
            DIGITS_WEIGHTS.parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / f"seed-{bundled}" / "model.safetensors", DIGITS_WEIGHTS)
    print(json.dumps({key: value for key, value in results.items() if key != "runs"}, indent=1))


if __name__ == "__main__":
    main()
