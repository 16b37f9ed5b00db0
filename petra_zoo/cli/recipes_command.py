"""`petra-zoo recipes`: the recipes that come with the package."""

from __future__ import annotations

import fnmatch
from typing import Annotated

import typer

from petra_zoo.cli.completion import complete_recipe, complete_setting
from petra_zoo.cli.output import on_terminal, print_lines, print_table
from petra_zoo.errors import UserError
from petra_zoo.strict_json import Json, to_json

app = typer.Typer(help="List, show, copy and try the recipes that come with the package.", no_args_is_help=True)

_COLUMNS = ("model", "dataset", "method", "stages", "epochs")


@app.command("ls")
def list_command(
    pattern: Annotated[str, typer.Argument(help="Wildcards, such as 'digits/*'.")] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List recipes."""
    from petra_zoo.settings.recipe_files import list_recipes

    names = fnmatch.filter(list_recipes(), pattern)
    if not names:
        raise UserError(f"no recipe matches {pattern!r}; petra-zoo recipes ls lists all, wildcards are * and ?")
    if as_json:
        typer.echo(to_json([_row(name) for name in names], indent=2))
    elif on_terminal():
        print_table(("recipe", *_COLUMNS), [[str(value) for value in _row(name).values()] for name in names])
    else:
        print_lines(names)


def _row(name: str) -> dict[str, Json]:
    """What a recipe is about, as its file says it: to check all settings takes torch and timm."""
    from petra_zoo.settings.recipe import Recipe
    from petra_zoo.settings.recipe_files import recipe_settings

    settings = recipe_settings(name)
    return {"name": name} | {key: settings.get(key, Recipe.model_fields[key].default) for key in _COLUMNS}


@app.command("settings")
def settings_command(
    name: Annotated[
        str | None,
        typer.Argument(help="Whose values to show; default: the defaults.", autocompletion=complete_recipe),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a page of documentation.")] = False,
) -> None:
    """List all settings: what each takes, its value, what it means."""
    from petra_zoo.settings.described import described_settings, settings_page
    from petra_zoo.settings.recipe_files import load_recipe

    settings = described_settings(load_recipe(name) if name else None)
    if as_json:
        typer.echo(to_json([setting._asdict() for setting in settings], indent=2))
    elif markdown:
        typer.echo(settings_page(settings), nl=False)
    else:
        for setting in settings:
            value = "required" if setting.value is None else setting.value
            typer.echo(f"{setting.name} = {value}  ({setting.takes})\n    {setting.meaning}")


@app.command("show")
def show_command(
    name: Annotated[str, typer.Argument(help="A recipe's name, or a .yaml file.", autocompletion=complete_recipe)],
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Print all settings, with those of the recipes that it extends.")
    ] = False,
) -> None:
    """Print a recipe's YAML."""
    from petra_zoo.settings.recipe_files import load_recipe, recipe_text, recipe_yaml

    typer.echo(recipe_yaml(load_recipe(name)) if resolved else recipe_text(name), nl=False)


@app.command("cp")
def copy_command(
    name: Annotated[str, typer.Argument(help="A recipe's name.", autocompletion=complete_recipe)],
    destination: Annotated[str, typer.Argument(metavar="DEST", help="The new file, or a folder (DIR/).")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Copy a recipe to a file of your own."""
    from petra_zoo.settings.recipe_files import copy_recipe

    typer.echo(str(copy_recipe(name, destination, force=force)))


@app.command("validate")
def validate_command(
    pattern: Annotated[
        str, typer.Argument(help="Wildcards, such as 'cifar10/*', or a .yaml file.", autocompletion=complete_recipe)
    ] = "*",
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Settings that replace the recipes'.", autocompletion=complete_setting
        ),
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="Can the stages be spread over so many processes?"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Build all that recipes ask for, on small generated files, and make two updates with two images at a time."""
    from petra_zoo.training.recipe_validation import validate_recipes

    verdicts = []
    for verdict in validate_recipes(pattern, overrides or [], nproc):
        verdicts.append(verdict)
        if not as_json:
            typer.echo(f"ok      {verdict.recipe}" if verdict.ok else f"failed  {verdict.recipe}: {verdict.reason}")
    if as_json:
        typer.echo(to_json([verdict.as_dict() for verdict in verdicts], indent=2))
    if not all(verdict.ok for verdict in verdicts):
        raise typer.Exit(1)
