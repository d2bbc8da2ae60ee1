"""Services that several test files need."""

import pytest

from live import Up, make_live_workspace


@pytest.fixture(scope="module")
def up(tmp_path_factory):
    """`cm up`, the servers alone."""
    services = Up(make_live_workspace(tmp_path_factory.mktemp("up") / "workspace"), "--no-workers")
    yield services
    services.stop()
