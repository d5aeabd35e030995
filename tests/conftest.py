"""Settings of the whole test run."""

import os

import pytest

# Before anything imports torch, and for the processes that tests start: tests are small, threads would only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("NO_COLOR", "1")

_SHARED = {"cluster": "ranks", "distributed": "ranks", "e2e": "e2e", "vllm": "vllm"}
"""Folders whose tests stay in one process of `pytest -n`: two jobs of several ranks at once would starve each other, and
what a session shares is made once. The others are kept together by file."""


@pytest.hookimpl(tryfirst=True)  # before that of pytest-xdist, which reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder, *_ = item.path.relative_to(item.config.rootpath / "tests").parts
        item.add_marker(pytest.mark.xdist_group(_SHARED.get(folder, item.path.stem)))
