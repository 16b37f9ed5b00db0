"""The fidelity report as files: JSON for programs, Markdown for the model card, a PNG to look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from petra_zoo.checkpoints.public import public_dataset, public_source
from petra_zoo.converters.fidelity import Fidelity
from petra_zoo.converters.reconstruction import CoupledRun
from petra_zoo.errors import UserError
from petra_zoo.models.training_memory import StepBytes
from petra_zoo.strict_json import JsonObject, to_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MIB = 2**20


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion cost and what it saves.

    Attributes:
        source: the source's name.
        output: where the converted network is.
        dataset: whose validation images were compared, training images having calibrated.
        tolerance: the largest reconstruction error that was allowed.
        fidelity: the comparison.
        input_size: (C, H, W) that memory was measured with.
        memory: activations per image of source, checkpointed source and converted network; see `conversion_memory`.
        steps: how much each block of the source adds to what it gets; see `measure_steps`.
    """

    source: str
    output: str
    dataset: str
    tolerance: float
    fidelity: Fidelity
    input_size: tuple[int, int, int]
    memory: dict[str, StepBytes]
    steps: dict[str, list[float]] = field(default_factory=dict)

    def as_dict(self) -> JsonObject:
        """For JSON: one object, the comparison's numbers at its top level."""
        own = {name: getattr(self, name) for name in ("source", "output", "dataset", "tolerance", "input_size")}
        memory = {name: found._asdict() for name, found in self.memory.items()}
        return {**own, **self.fidelity.as_dict(), "activation_bytes_per_image": memory, "steps": self.steps}

    def as_markdown(self) -> str:
        """For a model card, without places of this machine: two tables."""
        same = self.fidelity
        rows = [
            ("images compared", f"{same.images} of {public_dataset(self.dataset)}"),
            ("same prediction", f"{same.agreement:.2f} %"),
            ("logit error (relative)", f"{same.logit_error:.2e}"),
            ("KL divergence (nats)", f"{same.kl:.2e}"),
        ]
        if same.source_top1 is not None:
            rows.append(("top-1, source", f"{same.source_top1:.2f} %"))
            rows.append(("top-1, converted", f"{same.converted_top1:.2f} %"))
        height, width = self.input_size[1:]
        rows += [
            (f"activations per image at {height}x{width}, {name}", f"{stored / _MIB:.2f} MiB (peak {peak / _MIB:.2f})")
            for name, (stored, peak) in self.memory.items()
        ]
        lines = [f"Fidelity of the conversion of `{public_source(self.source)}`:", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in rows]
        lines += [
            "",
            "| run | reversible blocks | coupling g | streams kept every | reconstruction error |",
            "|---" * 5 + "|",
        ]
        lines += [
            f"| {run.layer} | {run.blocks} | {run.g:g} | {_kept(run)} | {f'{run.error:.1e}' if run.g else '-'} |"
            for run in same.runs
        ]
        return "\n".join(lines) + "\n"

    def draw(self) -> Figure:
        """The picture, a matplotlib figure: predictions, reconstruction errors and memory side by side."""
        figure_class = _matplotlib()
        figure = figure_class(figsize=(11, 3.4), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        same = self.fidelity
        bars = {"agreement": same.agreement}
        if same.source_top1 is not None and same.converted_top1 is not None:
            bars |= {"top-1\nsource": same.source_top1, "top-1\nconverted": same.converted_top1}
        left.bar_label(left.bar(list(bars), list(bars.values()), color="tab:blue"), fmt="%.2f")
        left.set(title=f"predictions on {same.images} images", ylabel="percent", ylim=(0, 110))
        runs = [run for run in same.runs if run.g > 0.0]
        names = [f"{run.layer}\ng = {run.g:g}" for run in runs]
        middle.plot(names, [max(run.error, 1e-9) for run in runs], "o", color="tab:green")
        if not runs:
            middle.text(0.5, 0.25, "nothing is reconstructed", ha="center", transform=middle.transAxes)
            middle.set_xticks([])
        middle.axhline(self.tolerance, color="tab:red", linestyle="--", label="tolerance")
        middle.set(title="reconstruction error", yscale="log")
        middle.legend()
        # What is stored between forward and backward is not what has to fit: the peak is, inside a recomputed block.
        places = range(len(self.memory))
        for shift, what, color in ((-0.2, "stored", "tab:orange"), (0.2, "peak", "tab:red")):
            values = [getattr(found, what) / _MIB for found in self.memory.values()]
            bars = right.bar([place + shift for place in places], values, 0.4, label=what, color=color)
            right.bar_label(bars, fmt="%.2f", fontsize=7)
        right.set(title="activations of a training step", ylabel="MiB per image")
        right.set_xticks(list(places), [name.replace(", ", "\n") for name in self.memory])
        right.margins(y=0.15)
        right.legend()
        return figure


def _kept(run: CoupledRun) -> str:
    if run.anchor_every:
        return f"{run.anchor_every} blocks"
    return f"- ({run.bits} bit{'s' if run.bits > 1 else ''} per element)" if run.bits else "-"


def check_report(path: Path) -> None:
    """Refuses a report that could not be written, or would replace a file, before anything is converted.

    Raises:
        UserError: the ending is of no known kind, a file is there already, or the picture needs matplotlib, which is
            missing.
    """
    if path.suffix not in ("", *_WRITERS) and not path.is_dir():
        raise UserError(f"--report {path}: expected a .json, .md or .png file, or a directory for all three")
    files = _files(path)
    taken = next((file for file in (*files, files[0].parent) if file.exists() and not file.is_dir()), None)
    if taken is not None:
        raise UserError(f"--report {path}: {taken} exists already: choose another, or move it away")
    if any(file.suffix == ".png" for file in files):
        _matplotlib()


def write_report(report: ConversionReport, path: Path) -> list[Path]:
    """Writes one file, or fidelity.json, fidelity.md and fidelity.png into a directory.

    Returns:
        The files.

    Raises:
        UserError: a file cannot be written.
    """
    files = _files(path)
    try:
        files[0].parent.mkdir(parents=True, exist_ok=True)
        for file in files:
            _WRITERS[file.suffix](report, file)
    except OSError as error:
        raise UserError(f"saved {report.output}, but cannot write {path}: {error.strerror}") from error
    return files


def _files(path: Path) -> list[Path]:
    alone = path.suffix in _WRITERS and not path.is_dir()
    return [path] if alone else [path / f"fidelity{suffix}" for suffix in _WRITERS]


def _write_json(report: ConversionReport, path: Path) -> None:
    path.write_text(to_json(report.as_dict(), indent=2) + "\n", encoding="utf-8")


def _write_markdown(report: ConversionReport, path: Path) -> None:
    path.write_text(report.as_markdown(), encoding="utf-8")


def _write_picture(report: ConversionReport, path: Path) -> None:
    report.draw().savefig(path, dpi=120)


_WRITERS: dict[str, Callable[[ConversionReport, Path], None]] = {
    ".json": _write_json,
    ".md": _write_markdown,
    ".png": _write_picture,
}


def _matplotlib() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("a picture needs matplotlib: pip install 'petra-zoo[plots]', or --report FILE.json") from None
    return Figure
