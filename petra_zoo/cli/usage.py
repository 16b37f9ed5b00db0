"""Mistakes in how a command is written, said in one line as all mistakes are."""

from __future__ import annotations

from typing import Any

import typer

# What typer raises for them; it does not export the class, which is click's own or a copy of it by typer's version.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def usage_line(error: Any) -> str:
    """What was wrong, and what to do.

    Args:
        error: a `UsageError`.
    """
    message = " ".join(error.format_message().split()).rstrip(".")
    if error.ctx is None or message.endswith("?"):
        return message
    if (setting := _meant_as_setting(error)) is not None:
        return f"{error.message}; settings are written KEY=VALUE, without dashes: {setting}=..."
    return f"{message}; {error.ctx.command_path} --help shows what it takes"


def asks_for_help(error: Exception) -> bool:
    """Whether nothing was wrong but that nothing was said: the error's text is the help."""
    return type(error).__name__ == "NoArgsIsHelpError"


def _meant_as_setting(error: Any) -> str | None:
    """The recipe's setting that somebody has written as an option."""
    from petra_zoo.settings.recipe import Recipe

    name = str(getattr(error, "option_name", "")).lstrip("-").replace("-", "_")
    takes_settings = any(parameter.name == "overrides" for parameter in error.ctx.command.params)
    return name if takes_settings and name in Recipe.model_fields else None
