"""Shared fixtures. `--run-slow` adds the tests that start servers or take a minute, `--run-soak` those of many."""

import os

import pytest

if processes := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # PyTorch would take all cores in each of them
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(processes))))


@pytest.fixture(autouse=True)
def environment():
    """Take back what the code under test has changed in the environment, as a command may: other tests follow."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run tests marked slow")
    parser.addoption("--run-soak", action="store_true", help="also run tests marked soak")
    parser.addoption("--kills", type=int, default=32, help="how often tests of kills kill, in all (32)")


def pytest_collection_modifyitems(config, items):
    for mark in ("slow", "soak"):
        skip = pytest.mark.skip(reason=f"{mark}; add --run-{mark}")
        for item in items:
            if item.get_closest_marker(mark) and not config.getoption(f"--run-{mark}"):
                item.add_marker(skip)
