"""One GPU: what a training step and a tick of the pipeline cost there, in kernel time, host time and memory.

    python benchmarks/gpu.py --json benchmarks/gpu/results.json                # everything, under 8 minutes
    python benchmarks/gpu.py step tick --json benchmarks/gpu/results.json --seconds 150
    python benchmarks/gpu.py cpu --json benchmarks/gpu/cpu.json                # what can be had without a GPU
    python benchmarks/gpu.py --quick --json /tmp/quick.json                    # tiny networks, on any CPU

Sections: `facts` of the machine; `step`, forward and backward under bf16 autocast of networks in all the ways to save
memory; `tick`, four stages in one process; `side_by_side`, the same beside backpropagation at several batches;
`tests`, `pytest -m gpu`; `cpu`, only if asked for: operations of a tick, the host's time, live and moved bytes.

The cases come in order of worth, and the file is complete after each: what it has is not repeated, a case that breaks
down is kept with its reason. `petra_zoo/bench/gpu` does the measuring and says what is measured how.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from petra_zoo.bench.gpu.study import SECTIONS, STAND_INS, GpuStudy
from petra_zoo.bench.results import Record, Results, Trial, claimed
from petra_zoo.errors import Failure
from petra_zoo.machine import describe_machine, describe_versions, now
from petra_zoo.strict_json import JsonObject, to_json


def main() -> None:
    every = (*SECTIONS, STAND_INS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(every)}; default: all but cpu")
    parser.add_argument("--json", type=Path, required=True, help="the results; what they have is not repeated")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose title has this text")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no further case is begun")
    parser.add_argument("--quick", action="store_true", help="tiny networks; the numbers say nothing")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(every):
        parser.error(f"no section {', '.join(sorted(unknown))}; expected some of {', '.join(every)}")
    study = replace(GpuStudy.small() if options.quick else GpuStudy(), sections=tuple(options.sections) or SECTIONS)
    end = time.monotonic() + options.seconds
    with claimed(options.json):
        results = Results.read(options.json) if options.json.exists() else Results(study.kind, study.name)
        for trial in study.trials(results):
            if options.only in study.title(trial) and trial not in results and time.monotonic() < end:
                measure(study, trial, results, options.json)


def measure(study: GpuStudy, trial: Trial, results: Results, path: Path) -> None:
    """Does one case and keeps what comes out of it."""
    start = time.monotonic()
    try:
        result: JsonObject = study.run(trial)
    except Failure as error:
        result = {"failed": str(error)}
    results.add(
        Record(trial.contender, 0, trial.settings, study.command(trial), result, describe_machine(),
               describe_versions(), now())
    )  # fmt: skip
    results.write(path)
    print(f"{study.title(trial)}: {to_json(result)} ({time.monotonic() - start:.0f} s)", flush=True)
    if "failed" in result:
        start_anew_if_lost()


def start_anew_if_lost() -> None:
    """A kernel that reads where it must not takes the whole CUDA context with it: only a new process can go on."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        os.execv(sys.executable, [sys.executable, *sys.argv])


if __name__ == "__main__":
    main()
