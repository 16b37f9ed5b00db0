"""The command line, `petra-zoo`. It starts at once: torch, timm and the like are imported inside the commands."""

from petra_zoo.cli.interruption import is_command_line, say_interruptions

if is_command_line():
    say_interruptions()
