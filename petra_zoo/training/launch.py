"""Several processes on one machine, through torch.distributed.run, and what is said when one of them fails."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record

from petra_zoo.errors import Failure
from petra_zoo.evaluation.watch import is_out_of_memory
from petra_zoo.petra import LinkError, global_rank, world_size
from petra_zoo.training.ranks import SharedError, SharedFailure
from petra_zoo.training.stopping import STOPPED, RunStopped

T = TypeVar("T")
_NOTE = "PETRA_ZOO_STOPPED"  # to its processes: the file in which they note that they were told to stop
_HANDED_ON = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
# A rank that lost a neighbour waits so long before it ends, so that the launcher finds the cause first.
LINGER_SECONDS = 2.0


def launch(processes: int, arguments: Sequence[str], restarts: int = 0) -> int:
    """Runs `python -m petra_zoo ARGUMENTS` in several processes of this machine.

    All of them share the terminal. Where one fails or dies, the others are ended within seconds.

    Args:
        processes: how many.
        arguments: of the command line.
        restarts: how often all of them are started again after one has failed: a run goes on where it was saved.

    Returns:
        The exit code: 0 done, 2 bad use, 75 stopped by a signal or by the time that was given, saved; else 1 with one
        line on the first failure.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # Seconds for a rank to end its tick and save, before it is killed; by the environment, because torch 2.11 has no
    # such option (and waits 30 seconds).
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
    # SIGUSR1 is what batch queues send ahead of the end.
    for name in ("PET_SIGNALS_TO_HANDLE", "TORCHELASTIC_SIGNALS_TO_HANDLE"):
        os.environ.setdefault(name, _HANDED_ON)
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # its banner buries the one line that matters
    # A launcher starts processes again after any exit code but 0: a run that was told to stop says so in a file.
    note = tempfile.NamedTemporaryFile(prefix="petra-zoo-stopped-")
    os.environ[_NOTE] = note.name
    options = ["--standalone", "--nproc-per-node", str(processes), "--max-restarts", str(restarts), "-m", "petra_zoo"]
    try:
        torchrun.run(torchrun.parse_args([*options, *arguments]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in (2, STOPPED):  # the process has said why
            return int(failure.exitcode)
        code = failure.exitcode
        what = f"exit code {code}" if code >= 0 else f"Signal {-code} ({signal.Signals(-code).name})"
        print(f"petra-zoo: rank {rank} failed ({what}); the other ranks were ended", file=sys.stderr)
        return 1
    except (SignalException, KeyboardInterrupt):
        return STOPPED  # its processes have got the signal too, and have saved
    finally:
        os.environ.pop(_NOTE)
        stopped = os.path.getsize(note.name) > 0
        note.close()
    return STOPPED if stopped else 0


def as_worker(work: Callable[[], T]) -> T:
    """Does work of the command line in this process; in one of several, failures are told so that the cause stands out.

    Training that has diverged or ran out of memory is said by the rank that found it; a mistake that all of them found
    by rank 0; a lost neighbour in one line, because it is a consequence; anything else with its traceback, which
    torch.distributed.run is told too.

    Raises:
        Failure: there is no memory for it; what the work raises.
    """
    work = partial(_in_memory, work)
    if world_size() == 1:
        try:
            return work()
        except RunStopped as stopped:
            print(f"petra-zoo: {stopped}", file=sys.stderr)
            raise SystemExit(_leave_note()) from None  # it is no interruption any more
    try:
        result = record(work)()
    except SharedError:
        if global_rank() > 0:
            sys.exit(2)
        raise
    except RunStopped as stopped:
        if global_rank() == 0:
            print(f"petra-zoo: {stopped}", file=sys.stderr, flush=True)
        raise SystemExit(_leave_note()) from None
    except SharedFailure:
        if global_rank() > 0:
            sys.exit(1)
        raise
    except Failure as error:
        print(f"petra-zoo: rank {global_rank()}: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # torch's process group would wait for the neighbour
    except LinkError as error:
        print(f"petra-zoo: rank {global_rank()}: {error}", file=sys.stderr, flush=True)
        time.sleep(LINGER_SECONDS)
        os._exit(1)  # torch's process group would wait for the neighbour
    assert result is not None  # as it would be of work that leaves with sys.exit(0)
    return result


def _in_memory(work: Callable[[], T]) -> T:
    """Does work; that memory did not suffice is a line, and no traceback."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, LinkError) or not is_out_of_memory(error):
            raise
        raise Failure(
            "out of memory: smaller micro-batches (batch_size, or max_delay with update_size) or more processes "
            "(--nproc) take less, and petra-zoo plan says how much; what was saved before is kept"
        ) from error


def _leave_note() -> int:
    """Tells the launcher that the run was told to stop; gives the exit code with which it starts nothing again.

    Ours is one, recipes/launch/slurm.sbatch another: any code but 0 would end the processes that are still saving.
    """
    note = os.environ.get(_NOTE)
    if note is None:  # somebody else's launcher
        return STOPPED
    with open(note, "a", encoding="utf-8") as file:
        file.write("stopped\n")
    return 0
