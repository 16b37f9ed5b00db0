"""What the converter does to ResNets: couplings, inverses, memory and time; and how faithful small trained ones stay.

    OMP_NUM_THREADS=1 python benchmarks/conversion/run.py             # all but the times
    OMP_NUM_THREADS=1 python benchmarks/conversion/run.py --times     # adds conversion times, on a quiet machine
    python benchmarks/conversion/run.py --table                       # README.md's tables from results.json

`depths`: timm's resnet18 to resnet152. Their weights are random (nothing is downloaded), their norms as after training:
weights in [0.3, 1], running statistics estimated on noise. The reconstruction error is measured on 8 noise images of
64x64 in float32, with running and with batch statistics; the larger one counts. Memory is counted on the meta device
at 224x224.

`fidelity`: small ResNets trained here with plain backpropagation, then converted with each coupling, statistics kept
or estimated anew on 1,024 training images, and compared with their source on the whole validation split.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import ResNet
from torch import Tensor, nn

from petra_zoo.converters import convert, measure_fidelity
from petra_zoo.converters.calibration import noise
from petra_zoo.converters.memory_report import conversion_memory
from petra_zoo.converters.reconstruction import measure_runs
from petra_zoo.data.datasets import open_dataset
from petra_zoo.data.loader import create_loader
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.settings.augmentation import Augmentation

RESULTS, README = (Path(__file__).with_name(name) for name in ("results.json", "README.md"))
DEPTHS = (18, 34, 50, 101, 152)
PURPOSES = ("one-device", "petra")
SEEDS = (0, 1, 2)
TOLERANCE = 1e-4
DATA: dict[str, dict[str, Any]] = {
    "digits": {"size": 8, "epochs": 12, "hflip": 0.0},
    "shapes": {"size": 16, "epochs": 15, "hflip": 0.5},
}
COUPLINGS: tuple[Any, ...] = ("auto", 1 / 8, 1 / 2, 1.0)
MIB = 2**20


def trained_like(depth: int) -> ResNet:
    """A ResNet with random weights and norms as after training."""
    torch.manual_seed(depth)
    model: Any = timm.create_model(f"resnet{depth}")
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.3, 1.0)
        nn.init.normal_(norm.bias, 0.0, 0.1)
        norm.momentum = None  # a cumulative average
    with torch.no_grad():
        model.train()(noise(model))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def convert_depth(depth: int) -> list[dict[str, Any]]:
    """Rows of the first table for one network, times apart."""
    source = trained_like(depth)
    rows = []
    for purpose in PURPOSES:
        model = convert(source, purpose=purpose, tolerance=TOLERANCE)
        runs = []
        for run in measure_runs(model, noise(model)):
            inverted = run.anchor_every or run.blocks
            runs.append(vars(run) | {"predicted_error": 6e-8 * run.g**-inverted if run.g and inverted else 0.0})
        memory = conversion_memory(source, model, (3, 224, 224))
        sizes = {name: use._asdict() for name, use in memory.items()}
        rows.append({"model": f"resnet{depth}", "purpose": purpose, "runs": runs, "bytes_per_image": sizes})
    return rows


def conversion_seconds(depth: int, rounds: int = 5) -> dict[str, float]:
    """Best and median time of `convert` with its defaults, model creation and saving apart."""
    source, times = trained_like(depth), []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        convert(source, tolerance=TOLERANCE)
        times.append(time.perf_counter() - start)
    return {"best": min(times[1:]), "median": statistics.median(times[1:]), "rounds": rounds}


def batches(name: str, split: Any, seed: int, train: bool) -> Any:
    """Batches of 64 images of a data set and their labels."""
    data, settings = open_dataset(name, split), DATA[name]
    augmentation = Augmentation(train_crop_mode="pad", crop_padding=settings["size"] // 8, hflip=settings["hflip"])
    size = (3, settings["size"], settings["size"])
    preprocessing = Preprocessing(size, data.mean, data.std, crop_pct=1.0 if size[-1] == data.image_size else 0.875)
    return create_loader(
        data, preprocessing, batch_size=64, augmentation=augmentation if train else None, seed=seed, drop_last=train
    )


def train(name: str, seed: int) -> ResNet:
    """A ResNet of 14 blocks for small images, trained with plain backpropagation."""
    torch.manual_seed(seed)
    arguments = {"layers": (3, 3, 6, 2), "channels": (16, 24, 32, 48), "stem_type": "deep", "stem_width": 8}
    model: Any = timm.create_model("resnet18", num_classes=10, zero_init_last=False, **arguments)
    model.conv1[0].stride, model.maxpool = (1, 1), nn.Identity()
    loader, epochs = batches(name, "train", seed, True), DATA[name]["epochs"]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs * len(loader))
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def fidelity(name: str, seed: int) -> list[dict[str, Any]]:
    """Rows of the second table: one network, every coupling, with and without new statistics."""
    source = train(name, seed)
    validation = list(batches(name, "val", 0, False))
    calibration: list[Tensor] = [images for images, _ in batches(name, "train", 0, False)][:16]
    rows = []
    for coupling in COUPLINGS:
        for estimated in (False, True):
            model = convert(
                source,
                coupling=coupling,
                purpose="petra",
                tolerance=TOLERANCE,
                calibration=calibration if estimated else None,
            )
            found = measure_fidelity(source, model, validation)
            rows.append(
                {"dataset": name, "seed": seed, "coupling": coupling, "statistics_estimated": estimated}
                | {key: value for key, value in found.as_dict().items() if key != "runs"}
                | {"runs": [vars(run) for run in found.runs]}
            )
    return rows


def depth_table(results: dict[str, Any]) -> str:
    """The first table, in Markdown."""
    lines = [
        "| network | for | g per run (blocks) | anchors | predicted | measured | stored: source | checkpointed "
        "| converted | peak: source | checkpointed | converted | seconds |",
        "|---" * 13 + "|",
    ]
    for row in results["depths"]:
        runs = [run for run in row["runs"] if run["blocks"]]
        kept = [f"{run['layer']} every {run['anchor_every']}" for run in runs if run["anchor_every"]]
        errors = [f"{max(run[key] for run in runs):.0e}" for key in ("predicted_error", "error")]
        g = ", ".join(f"{run['g']:g} ({run['blocks']})" for run in runs)
        bytes_ = [use[kind] / MIB for kind in ("stored", "peak") for use in row["bytes_per_image"].values()]
        seconds = results.get("seconds", {}).get(row["model"]) if row["purpose"] == "one-device" else None
        cells = [row["model"], row["purpose"], g, "; ".join(kept) or "-", *errors, *(f"{b:.1f}" for b in bytes_)]
        lines.append("| " + " | ".join([*cells, f"{seconds['median']:.2f}" if seconds else "-"]) + " |")
    return "\n".join(lines) + "\n"


def fidelity_table(results: dict[str, Any]) -> str:
    """The second table: mean over the seeds, and the worst seed of what may not get worse."""
    lines = [
        "| data | g | statistics | top-1 source | top-1 converted | agreement, mean (worst) | logit error | KL | "
        "largest reconstruction error |",
        "|---" * 9 + "|",
    ]
    keys = dict.fromkeys((r["dataset"], r["coupling"], r["statistics_estimated"]) for r in results["fidelity"])
    for name, coupling, estimated in keys:
        rows = [
            r
            for r in results["fidelity"]
            if (r["dataset"], r["coupling"], r["statistics_estimated"]) == (name, coupling, estimated)
        ]
        mean = {
            key: statistics.mean(r[key] for r in rows)
            for key in ("source_top1", "converted_top1", "agreement", "logit_error", "kl")
        }
        worst = min(r["agreement"] for r in rows)
        error = max(run["error"] for r in rows for run in r["runs"])
        lines.append(
            f"| {name} | {coupling} | {'estimated anew' if estimated else 'kept'} | {mean['source_top1']:.2f} "
            f"| {mean['converted_top1']:.2f} | {mean['agreement']:.2f} ({worst:.2f}) | {mean['logit_error']:.3f} "
            f"| {mean['kl']:.4f} | {error:.0e} |"
        )
    return "\n".join(lines) + "\n"


def write_tables(results: dict[str, Any]) -> None:
    """Puts both tables between their markers in README.md."""
    text = README.read_text(encoding="utf-8")
    for name, table in (("depths", depth_table(results)), ("fidelity", fidelity_table(results))):
        before, _, rest = text.partition(f"<!-- {name} -->\n")
        text = f"{before}<!-- {name} -->\n{table}<!-- end {name} -->" + rest.partition(f"<!-- end {name} -->")[2]
    README.write_text(text, encoding="utf-8")


def measure_missing(results: dict[str, Any]) -> None:
    """Adds what is not there yet, saved row by row: an interrupted benchmark goes on where it stopped."""
    todo: list[tuple[str, Any]] = [("depths", depth) for depth in DEPTHS]
    todo += [("fidelity", (name, seed)) for name in DATA for seed in SEEDS]
    for part, key in todo:
        rows = results.setdefault(part, [])
        if part == "depths" and not any(row["model"] == f"resnet{key}" for row in rows):
            rows += convert_depth(key)
        elif part == "fidelity" and not any((row["dataset"], row["seed"]) == key for row in rows):
            rows += fidelity(*key)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(part, key, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", action="store_true", help="measure conversion times only")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, one thread"
    if arguments.times:
        results["seconds"] = {f"resnet{depth}": conversion_seconds(depth) for depth in DEPTHS}
        results["seconds_machine"] = f"{machine}; load average {os.getloadavg()[0]:.2f}"
    elif not arguments.table:
        results |= {
            "command": "OMP_NUM_THREADS=1 python benchmarks/conversion/run.py",
            "machine": machine,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
            "tolerance": TOLERANCE,
            "data": DATA,
        }
        measure_missing(results)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_tables(results)


if __name__ == "__main__":
    main()
