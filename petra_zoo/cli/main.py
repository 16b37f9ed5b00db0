"""`petra-zoo`: the command line. One small file per command, no logic of its own, nothing heavy at import."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from petra_zoo.cli import (
    bench_command,
    checkpoint_command,
    convert_command,
    data_command,
    demo_command,
    evaluate_command,
    export_command,
    info_command,
    list_command,
    lr_command,
    plan_command,
    plot_command,
    predict_command,
    push_command,
    recipes_command,
    report_command,
    runs_command,
    speed_command,
    train_command,
)
from petra_zoo.cli.usage import UsageError, asks_for_help, usage_line
from petra_zoo.errors import Failure, UserError
from petra_zoo.extensions import import_modules
from petra_zoo.files import expand_home

_INTERRUPTED = 130  # typer's code for Ctrl-C

app = typer.Typer(
    name="petra-zoo",
    help="Reversible networks for timm, trained with PETRA. Start with: petra-zoo demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo_command.demo)
app.command("data")(data_command.data)
app.command("train")(train_command.train)
app.command("lr")(lr_command.lr)
app.command("evaluate")(evaluate_command.evaluate)
app.command("predict")(predict_command.predict)
app.command("export")(export_command.export)
app.command("speed")(speed_command.time_model)
app.command("convert")(convert_command.convert)
app.command("push")(push_command.push)
app.command("list")(list_command.list_models)
app.command("info")(info_command.info)
app.command("plan")(plan_command.plan)
app.add_typer(recipes_command.app, name="recipes")
app.add_typer(checkpoint_command.app, name="checkpoint")
app.add_typer(bench_command.app, name="bench")
app.command("report")(report_command.report)
app.command("runs")(runs_command.runs)
app.command("plot")(plot_command.plot)


def _say_version(wanted: bool) -> None:
    if wanted:
        from petra_zoo import __version__

        typer.echo(f"petra-zoo {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and leave.", callback=_say_version, is_eager=True),
    ] = False,
    imports: Annotated[
        list[str] | None,
        typer.Option(
            "--import", metavar="MODULE", help="Import your module, which registers models and the like; repeatable."
        ),
    ] = None,
) -> None:
    import_modules(imports or [])


def run(arguments: list[str] | None = None) -> None:
    """Runs the command line. Exit codes: 0 done, 1 failed, 2 bad use."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own, which says everything once
    words = [expand_home(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    try:
        code = app(words, standalone_mode=False)  # else typer draws a box around what is wrong
    except (UserError, Failure) as error:
        print(f"petra-zoo: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except UsageError as error:
        print(error if asks_for_help(error) else f"petra-zoo: {usage_line(error)}", file=sys.stderr)
        sys.exit(2)
    except typer.Abort:
        raise KeyboardInterrupt from None
    if code == _INTERRUPTED:  # which typer passes over in silence
        raise KeyboardInterrupt
    sys.exit(code or 0)
