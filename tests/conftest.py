"""Settings of the whole test run."""

import os

# Before anything imports torch, and for the processes that tests start: tests are small, threads would only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("NO_COLOR", "1")
