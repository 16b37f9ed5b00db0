"""`python -m petra_zoo` is `petra-zoo`."""

from petra_zoo.cli.main import run

run()
