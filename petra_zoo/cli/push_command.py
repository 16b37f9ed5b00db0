"""`petra-zoo push`: publish a trained model on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from petra_zoo.strict_json import to_json


def push(
    directory: Annotated[Path, typer.Argument(metavar="RUN_OR_DIR", help="What petra-zoo train or convert wrote.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="ORG/NAME on the Hub; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch; made if there is none. Default: main.")] = None,
    message: Annotated[str | None, typer.Option(help="The commit's message.")] = None,
    card_only: Annotated[bool, typer.Option("--card-only", help="Card and results, not the weights.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show files and card; send nothing.")] = False,
    license: Annotated[str | None, typer.Option(help="Such as mit; default: its source's.")] = None,
    dataset_id: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="The data set on the Hub that the results are for.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Publish a model on the Hub: weights, config, card, recipe, results; download it again and compare."""
    from petra_zoo.hub import push as publish

    done = publish(
        directory,
        repo_id,
        private=private,
        create_pr=create_pr,
        revision=revision,
        message=message,
        card_only=card_only,
        dry_run=dry_run,
        license=license,
        dataset_id=dataset_id,
    )
    if as_json:
        typer.echo(to_json(done.as_dict(), indent=2))
        return
    for name, size in done.files.items():
        typer.echo(f"  {size:>11,} bytes  {name}")
    if dry_run:
        typer.echo(f"would be pushed to {done.url}; README.md:\n\n{done.card}")
        return
    typer.echo(f"pushed {done.url}" if done.changed else f"nothing has changed since {done.url}: no commit")
    typer.echo("downloaded again: every file is the same" + ("" if card_only else ", and so are the logits"))
    if not card_only:
        at = f"@{done.commit}" if create_pr or revision not in (None, "main") else ""
        typer.echo(f"next: petra-zoo evaluate hf-hub:{repo_id}{at}")
