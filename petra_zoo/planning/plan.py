"""`petra-zoo plan`: what the methods would do on the devices one has, as tables, JSON and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

from petra_zoo.errors import UserError
from petra_zoo.petra.profile import Profile
from petra_zoo.planning.cluster import Cluster
from petra_zoo.planning.performance import Forecast, forecast
from petra_zoo.planning.quantities import format_bytes
from petra_zoo.planning.schedules import all_schedules
from petra_zoo.settings.delay import above_border
from petra_zoo.strict_json import JsonObject

SCALES = (1, 2, 4, 8, 16, 32, 64)
PLAN_COLUMNS = (
    "method",
    "images/s",
    "efficiency",
    "replicas x stages",
    "units per stage",
    "link, per micro-batch",
    "memory, largest device",
    "delay, stage 0, in updates",
    "",
)


@dataclass(frozen=True)
class Plan:
    """Predictions of every method, at the number of devices asked for and at 1 to 64.

    Attributes:
        micro_batches: images of an update over the profile's micro-batch size.
    """

    profile: Profile
    cluster: Cluster
    devices: int
    micro_batches: int
    predictions: tuple[Forecast, ...]
    curves: dict[str, tuple[Forecast, ...]]

    def rows(self) -> list[list[str]]:
        """One row per method for the devices asked for, under `PLAN_COLUMNS`."""
        return [_row(prediction) for prediction in self.predictions]

    def curve_rows(self) -> list[list[str]]:
        """Images per second of each method at every number of devices; in parentheses what does not fit."""
        return [
            [method, *(_bracketed(f"{p.images_per_second:.4g}", p.rejected is not None) for p in curve)]
            for method, curve in self.curves.items()
        ]

    def notes(self) -> list[str]:
        """What a reader of the rows has to know: what was measured where, what does not fit, what is late."""
        p = self.profile
        images = self.micro_batches * p.batch_size
        notes = [
            f"{p.model}, {len(p.units)} units, micro-batches of {p.batch_size} images of "
            f"{'x'.join(map(str, p.input_size))}, {images} images per update",
            f"measured on {p.device}, {p.threads} thread{'s' if p.threads > 1 else ''}, {p.machine}: "
            f"plain backpropagation {p.batch_size / sum(p.costs('backprop')):.4g} images/s on one device",
        ]
        notes += [f"{p.method}: rejected, {p.rejected}" for p in self.predictions if p.rejected]
        return notes + self._warnings()

    def _warnings(self) -> list[str]:
        """Where delays are expected to cost accuracy; one line for all methods that have the same delay."""
        late: dict[str, list[str]] = {}
        for prediction in self.predictions:
            if above := above_border(prediction.delay[0]):
                late.setdefault(above, []).append(prediction.method)
        advice = "more and smaller --micro-batches of the same update, or fewer devices"
        return [f"warning: {', '.join(methods)}: {above}: {advice}" for above, methods in late.items()]

    def as_dict(self) -> JsonObject:
        """For JSON: every prediction with every link and device."""
        cluster = {name: None if value == float("inf") else value for name, value in asdict(self.cluster).items()}
        return {
            "model": self.profile.model,
            "batch_size": self.profile.batch_size,
            "micro_batches": self.micro_batches,
            "devices": self.devices,
            "cluster": cluster,
            "predictions": [_as_dict(prediction) for prediction in self.predictions],
            "curves": {method: [_as_dict(p) for p in curve] for method, curve in self.curves.items()},
            "profile": asdict(self.profile),
        }


def make_plan(
    profile: Profile, devices: int, cluster: Cluster, *, micro_batches: int = 8, optimizer_states: int = 1
) -> Plan:
    """Predicts every method at `devices` and at 1 to 64 devices."""

    def at(method: str, n: int) -> Forecast:
        return forecast(profile, method, n, cluster, micro_batches=micro_batches, optimizer_states=optimizer_states)

    scales = sorted({*SCALES, devices})
    curves = {method: tuple(at(method, n) for n in scales) for method in all_schedules()}
    predictions = tuple(curve[scales.index(devices)] for curve in curves.values())
    return Plan(profile, cluster, devices, micro_batches, predictions, curves)


def draw(plan: Plan, path: Path) -> None:
    """Draws images per second and the largest device's memory over the number of devices.

    Raises:
        UserError: matplotlib is missing, or it cannot write such a file.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install 'petra-zoo[plots]'") from error
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    # Methods that are equally fast lie on one another: later ones are thinner, and marked otherwise.
    styles = zip(("o", "s", "^", "v", "D", "P", "X", "*"), (4.5, 4, 3.5, 3, 2.5, 2, 1.5, 1), strict=True)
    for (method, curve), (marker, width) in zip(plan.curves.items(), cycle(styles), strict=False):
        counts = [p.devices for p in curve]
        fits = [p.rejected is None for p in curve]
        images = [p.images_per_second for p in curve]
        (line,) = speed.plot(counts, images, label=method, linewidth=width, alpha=0.7)
        for filled in (True, False):
            points = [(n, y) for n, y, fit in zip(counts, images, fits, strict=True) if fit == filled]
            speed.plot(
                *zip(*points, strict=True) if points else ((), ()),
                marker=marker,
                linestyle="",
                color=line.get_color(),
                fillstyle="full" if filled else "none",
            )
        memory.plot(
            counts,
            [max(m.total for m in p.memory) / 1e9 for p in curve],
            marker=marker,
            linewidth=width,
            alpha=0.7,
            label=method,
        )
    if plan.cluster.memory is not None:
        memory.axhline(plan.cluster.memory / 1e9, color="black", linestyle="--", label="--memory")
    speed.set_ylabel("images per second" + (" (hollow: does not fit)" if plan.cluster.memory is not None else ""))
    memory.set_ylabel("GB on the largest device")
    for axes in (speed, memory):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("devices")
        axes.set_xticks(counts, [str(n) for n in counts])
        # Plain numbers, also between powers of ten: a plot may span less than one of them.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    memory.legend()
    figure.suptitle(
        f"{plan.profile.model}: predicted, {plan.micro_batches * plan.profile.batch_size} images per update"
    )
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the plot {path}: {error}") from error


def _row(p: Forecast) -> list[str]:
    links = sorted({(link.up, link.down) for link in p.links}, key=sum)
    largest = max(p.memory, key=lambda memory: memory.total)
    name, size = largest.largest()
    idle = p.devices - p.replicas * p.stages
    return [
        p.method,
        f"{p.images_per_second:.4g}",
        f"{100 * p.efficiency:.1f} %",
        f"{p.replicas} x {p.stages}" + (f", {idle} idle" if idle else ""),
        _units(p.split),
        f"{format_bytes(links[-1][0])} up, {format_bytes(links[-1][1])} down" if links else "none",
        f"{format_bytes(largest.total)} ({name} {format_bytes(size)})",
        f"{p.delay[0]:.3g}",
        "rejected" if p.rejected else "",
    ]


def _units(split: Sequence[int]) -> str:
    return f"{min(split)} to {max(split)}" if len(split) > 8 else " ".join(map(str, split))


def _bracketed(text: str, brackets: bool) -> str:
    return f"({text})" if brackets else text


def _as_dict(prediction: Forecast) -> JsonObject:
    memory = [asdict(m) | {"total": m.total} for m in prediction.memory]
    return asdict(prediction) | {"memory": memory}
