"""`petra-zoo recipes`: the recipes that come with the package."""

import fnmatch
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from petra_zoo.settings.recipe_files import copy_recipe, list_recipes, load_recipe, recipe_text, recipe_yaml
from petra_zoo.strict_json import to_json
from petra_zoo.training.recipe_validation import validate_recipes

app = typer.Typer(help="List, show, copy and try the recipes that come with the package.", no_args_is_help=True)

_COLUMNS = ("model", "dataset", "method", "stages", "epochs")


@app.command("ls")
def list_command(
    pattern: Annotated[str, typer.Argument(help="Wildcards, such as 'digits/*'.")] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List recipes."""
    names = fnmatch.filter(list_recipes(), pattern)
    rows = [{"name": name, **load_recipe(name).model_dump(include=set(_COLUMNS))} for name in names]
    console = Console()
    if as_json:
        typer.echo(to_json(rows, indent=2))
    elif console.is_terminal:
        table = Table("recipe", *_COLUMNS)
        for row in rows:
            table.add_row(*(str(row[column]) for column in ("name", *_COLUMNS)))
        console.print(table)
    else:
        typer.echo("".join(f"{name}\n" for name in names), nl=False)


@app.command("show")
def show_command(
    name: Annotated[str, typer.Argument(help="A recipe's name, or a .yaml file.")],
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Print all settings, with those of the recipes that it extends.")
    ] = False,
) -> None:
    """Print a recipe's YAML."""
    typer.echo(recipe_yaml(load_recipe(name)) if resolved else recipe_text(name), nl=False)


@app.command("cp")
def copy_command(
    name: Annotated[str, typer.Argument(help="A recipe's name.")],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="The new file, or an existing folder.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Copy a recipe to a file of your own."""
    typer.echo(str(copy_recipe(name, destination, force=force)))


@app.command("validate")
def validate_command(
    pattern: Annotated[str, typer.Argument(help="Wildcards, such as 'cifar10/*', or a .yaml file.")] = "*",
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings that replace the recipes'.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Build all that recipes ask for, on small generated files, and make two updates with two images at a time."""
    verdicts = []
    for verdict in validate_recipes(pattern, overrides or []):
        verdicts.append(verdict)
        if not as_json:
            typer.echo(f"ok      {verdict.recipe}" if verdict.ok else f"failed  {verdict.recipe}: {verdict.reason}")
    if as_json:
        typer.echo(to_json([verdict.as_dict() for verdict in verdicts], indent=2))
    if not all(verdict.ok for verdict in verdicts):
        raise typer.Exit(1)
