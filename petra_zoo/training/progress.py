"""What a person sees of a run: a progress bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from torch.nn.modules.batchnorm import _BatchNorm

from petra_zoo.petra import Pipeline, World
from petra_zoo.reversible import UnitModel
from petra_zoo.settings.delay import WITHOUT_BATCH_NORM, above_border, advice, say_update
from petra_zoo.settings.recipe import Recipe
from petra_zoo.training.callbacks import ValidationEvent
from petra_zoo.training.length import Length, warn_of_warm_up
from petra_zoo.wording import counted


def has_batch_norm(model: UnitModel) -> bool:
    """Whether any of its layers normalises over the batch."""
    return any(isinstance(m, _BatchNorm) for unit in model.units() for m in unit.modules())


class Reporter:
    """Reports a run to a console.

    Args:
        console: rich's; whether it is a terminal decides between a bar and lines.
        quiet: say nothing at all.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Console(highlight=False)
        self.quiet = quiet
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._plain_interval = 0

    @property
    def live(self) -> bool:
        """Whether somebody watches a bar, between the lines of the log."""
        return self._bar is not None

    def start(self, recipe: Recipe, pipeline: Pipeline, batches: int, epochs: int) -> None:
        """Says what is about to run: stages, how evenly several ranks share the work, and how late an update comes."""
        self._plain_interval = recipe.log_interval * recipe.accumulation_steps
        layout, sizes = pipeline.layout, pipeline.layout.sizes
        length = (
            counted(epochs, "epoch")
            if recipe.max_updates is None
            else f"{counted(recipe.max_updates, 'update')}, epochs"
        )
        if not pipeline.method.delayed:
            how = f"{recipe.method} (exact, no delay)"
        else:
            how = f"{recipe.method}: {counted(len(sizes), 'stage')} of {', '.join(map(str, sizes))} units"
        self.line(
            f"{recipe.model} on {recipe.dataset}, {how}, {length} of {counted(batches, 'micro-batch')}, "
            f"{_where(pipeline.world)}"
        )
        if pipeline.world.size > 1:
            for rank, (stages, share) in enumerate(zip(layout.ranks, layout.loads(), strict=True)):
                owned = [str(sizes[j]) for j in stages]
                self.line(
                    f"  rank {rank}  stages {stages[0]} to {stages[-1]}  units {'+'.join(owned)}  load {share:.0%}"
                )
            efficiency = layout.efficiency(pipeline.method.delayed)
            self.line(f"  predicted efficiency {efficiency:.0%} of {pipeline.world.size} processes")
        if recipe.data_parallel > 1:
            self.line(f"  {recipe.data_parallel} replicas of it")
        self.line(say_update(recipe))
        if above := above_border(recipe.delay[0], recipe.opt):
            self.line(f"warning: {above}: {advice(recipe)}")
        elif recipe.delay[0] >= 1.0 and not has_batch_norm(pipeline.model):
            self.line(f"warning: {WITHOUT_BATCH_NORM}")
        if too_few := warn_of_warm_up(recipe, batches):
            self.line(f"warning: {too_few}")
        if self.console.is_terminal and not self.quiet:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[state]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            total = Length.of(recipe, batches).total
            self._task = self._bar.add_task("training", total=total, state="")

    def batch(
        self, epoch: int, done: int, total: int, images: int, loss: float | None, top1: float, speed: float, fill: str
    ) -> None:
        """One micro-batch was fed."""
        if self._bar:
            shown = f"loss {loss:.3f} acc {top1:.1f}%" if loss is not None else "filling"
            state = f"{shown}  {speed:.0f} img/s  in flight {fill}"
            self._bar.update(self._task, description=f"epoch {epoch + 1}", completed=done, state=state)
        elif loss is not None and self._plain_interval and done % self._plain_interval == 0:
            seconds = (total - done) * images / max(speed, 1e-9)
            shown = f"loss {loss:.4f}  acc {top1:.1f}%  {speed:.0f} img/s  {seconds:.0f} s left"
            self.line(f"epoch {epoch + 1}  {done}/{total}  {shown}")

    def epoch(self, event: ValidationEvent) -> None:
        """An epoch ended and was validated; no loss: its micro-batches have not reached the head yet."""
        shown = "pipeline filling" if event.train_loss is None else f"train loss {event.train_loss:.4f}"
        validation = f"val loss {event.loss:.4f}  val top-1 {event.top1:.2f} %"
        self.line(f"epoch {event.epoch:>3}  {shown}  {validation}  {event.training_seconds:.1f} s")

    def line(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        if not self.quiet:
            self.console.print(text, soft_wrap=True)

    def __enter__(self) -> Self:
        return self

    def show(self) -> None:
        """Shows the bar, once there is one."""
        if self._bar:
            self._bar.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()


def _where(world: World) -> str:
    """On what a process computes, and how it hears of the others."""
    device = counted(torch.get_num_threads(), "thread") if world.device.type == "cpu" else str(world.device)
    return device if world.alone else f"{device} each, {world.transport}"
