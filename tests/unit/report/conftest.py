"""Run directories to report on, written once a session where a test only reads them."""

import pytest

from tests.unit.report.synthetic_run import write_run


@pytest.fixture(scope="session")
def full_run(tmp_path_factory):
    """A finished run of all four arms. Read only."""
    return write_run(tmp_path_factory.mktemp("runs") / "tiny-cpu")
