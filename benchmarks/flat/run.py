"""How long a pipeline's tick is with 2 to 512 ranks whose times vary from tick to tick.

    python benchmarks/flat/run.py             # a minute of one core
    python benchmarks/flat/run.py --table     # README.md from results.json

The recurrence that the links' order of posting and waiting gives (tests/petra/test_orders.py runs the links themselves
in virtual time): a rank posts the receives of the next tick, waits for what came up, goes forward and sends, waits for
what came down, goes backward and sends; a message travels once it was sent, its receive was posted and the one before
it has arrived. Equal stages; each forward and backward takes its time times a lognormal number of mean 1.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from petra_zoo.machine import describe_machine

RESULTS, PAGE = (Path(__file__).with_name(name) for name in ("results.json", "README.md"))
RANKS, JITTERS = (2, 4, 8, 16, 32, 64, 128, 256, 512), (0.0, 0.02, 0.1, 0.3)
FORWARD, BACKWARD, UP, DOWN = 0.25, 0.75, 0.05, 0.1  # of a tick without jitter
TICKS = 4000

Times = npt.NDArray[np.float64]


def tick(ranks: int, jitter: float, seed: int = 0) -> float:
    """Mean seconds of a tick in the long run; jitter: standard deviation of the log of each time."""
    random = np.random.default_rng(seed)
    ended, went_up, went_down = np.zeros(ranks), np.full(ranks, -np.inf), np.full(ranks, -np.inf)
    first = 0.0
    for number in range(TICKS):
        noise = np.exp(jitter * random.standard_normal((2, ranks)) - jitter**2 / 2)
        began = ended
        forward = np.maximum(began, _from_below(went_up)) + FORWARD * noise[0]
        up = np.maximum(forward, went_up)  # where the last one has not gone, sending waits
        ended = np.maximum(up, _from_above(went_down)) + BACKWARD * noise[1]
        ended = np.maximum(ended, went_down)
        went_up = np.maximum(up, _from_above(began)) + UP
        went_down = np.maximum(ended, _from_below(began)) + DOWN
        went_up[-1] = went_down[0] = -np.inf  # nobody is there
        if number == TICKS // 4:
            first = float(ended.mean())
    return (float(ended.mean()) - first) / (TICKS - 1 - TICKS // 4)


def _from_below(x: Times) -> Times:
    return np.concatenate([[-np.inf], x[:-1]])


def _from_above(x: Times) -> Times:
    return np.concatenate([x[1:], [-np.inf]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="write README.md from the results")
    if not parser.parse_args().table:
        rows = [{"ranks": n, **{f"{jitter:g}": tick(n, jitter) for jitter in JITTERS}} for n in RANKS]
        settings = {"forward": FORWARD, "backward": BACKWARD, "up": UP, "down": DOWN, "ticks": TICKS}
        RESULTS.write_text(json.dumps({"settings": settings, "rows": rows, "machine": describe_machine()}, indent=1))
    PAGE.write_text(page(json.loads(RESULTS.read_text())))


def page(results: dict[str, Any]) -> str:
    spreads = [f"{jitter:g}" for jitter in JITTERS]
    lines = [
        "# Where the tick stops being flat\n",
        "`python benchmarks/flat/run.py`: a tick of equal ranks over its length without jitter, where each forward",
        "and backward takes its time times a lognormal number of mean 1 and of the spread given.\n",
        f"| ranks | {' | '.join(f'{100 * jitter:g} %' for jitter in JITTERS)} |",
        "|---|" + "---|" * len(JITTERS),
    ]
    for row in results["rows"]:
        lines.append(" | ".join([f"| {row['ranks']}", *(f"{row[spread]:.2f}" for spread in spreads)]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
