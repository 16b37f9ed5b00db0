"""What holds for all tests.

One thread per process: on a busy machine OpenMP's threads wait for each other, and tests would run into timeouts.
No Hub but the loopback one (`hub`, `hub_server`): whoever forgets the fixture is told so at once, not after retries.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start
os.environ["HF_HUB_OFFLINE"] = "1"

from tests.hub_fixtures import hub, hub_server

__all__ = ["hub", "hub_server"]
