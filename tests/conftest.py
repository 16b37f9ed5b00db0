"""One thread per process: on a busy machine OpenMP's threads wait for each other, and tests would run into timeouts."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start

from tests.hub_fixtures import hub, hub_server

__all__ = ["hub", "hub_server"]
