"""Pages that say what their commands do, because the commands have been run: prose, and commands to run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_BLOCK = re.compile(r"(?m)((?:^    .*\n)+)")
_MISTAKE, _WARNING = "petra-zoo: ", "WARNING: "  # of what goes to stderr; the rest is libraries' and bars


def write_page(
    source: str,
    work: Path,
    environment: Mapping[str, str],
    *,
    replaced: Mapping[str, str] | None = None,
    terminal: bool = False,
) -> str:
    """The page: prose as it stands, and each command with what it says below.

    Args:
        source: Markdown; what is indented by four spaces is a command, what is indented by eight goes on with it.
        work: the folder in which they run.
        environment: beside this process's.
        replaced: what stands for texts that differ from run to run, such as addresses.
        terminal: whether they run as for a person, stdout a terminal of 80 columns whose cursor stays where it is, and
            warnings told; else stdout is a pipe.

    Raises:
        RuntimeError: a command fails, but for a mistake that it explains in a line.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    around = {**os.environ, **environment, "PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "TERM": "dumb"}
    lines: list[str] = []
    for block in _BLOCK.split(source):
        if not block.startswith("    "):
            lines += block.splitlines()
            continue
        lines.append("```console")
        for command in _commands(block):
            said = "\n".join([f"$ {command}", *_run(command, work, around, terminal)])
            for text, stands_for in (replaced or {}).items():
                said = said.replace(text, stands_for)
            lines += _told(said)
        lines.append("```")
    return "\n".join(lines) + "\n"


def commands_of(source: str) -> list[str]:
    """All commands of a page's source, in its order."""
    return [command for block in _BLOCK.findall(source) for command in _commands(block)]


def masked(page: str, names: Sequence[str] = ()) -> list[str]:
    """A page without what differs from machine to machine: numbers, hashes, and which classes are hardest.

    Args:
        page: its text.
        names: words that may stand for each other, such as classes.
    """
    text = re.sub(r"\b[0-9a-f]{40}\b", "HASH", page)
    for name in names:
        text = re.sub(rf"\b{name}\b", "NAME", text)
    text = re.sub(r"\d+ s\b|\d+:\d+ min\b|[\d.]+ h\b", "TIME", text)
    kept = [line for line in text.splitlines() if not line.startswith("  worst")]
    numbers = [re.sub(r"\d+(?:[.,]\d+)*", " #", re.sub("─+", "─", line)) for line in kept]
    return [" ".join(line.split()) for line in numbers]


def _run(command: str, work: Path, environment: Mapping[str, str], terminal: bool) -> Iterator[str]:
    """The lines that a command says."""
    read, write = os.openpty() if terminal else os.pipe()
    with tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(["bash", "-c", command], cwd=work, env=environment, stdout=write, stderr=stderr)
        os.close(write)
        stdout = _read(read)
        code = process.wait()
        stderr.seek(0)
        noted = stderr.read()
    mistakes = [line for line in noted.splitlines() if line.startswith(_MISTAKE)]
    if code not in (0, 2) or (code == 2 and not mistakes):
        raise RuntimeError(f"{command}\n{stdout}\n{noted}")
    warnings = [line for line in noted.splitlines() if terminal and line.startswith(_WARNING)]
    yield from (line.rstrip() for line in [*warnings, *stdout.splitlines(), *mistakes])


def _read(descriptor: int) -> str:
    """All that comes until the last writer has closed its end."""
    parts = []
    with suppress(OSError):  # a terminal's way to say that there is no writer left
        while part := os.read(descriptor, 65536):
            parts.append(part)
    os.close(descriptor)
    return re.sub(r"\r+\n", "\n", b"".join(parts).decode("utf-8", errors="replace"))


def _told(output: str) -> list[str]:
    """Lines without times: this is no place for speed."""
    return [re.sub(r"\s+[\d.]+ s$", "", line) for line in output.splitlines() if " img/s " not in line]


def _commands(block: str) -> list[str]:
    commands: list[str] = []
    for line in (line[4:] for line in block.splitlines()):
        if line.startswith("    "):
            commands[-1] += "\n" + line[4:]
        else:
            commands.append(line)
    return commands
