"""Shared fixtures. `--run-slow` adds the tests that take minutes or start servers and browsers."""

import pytest


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run tests marked slow")
    parser.addoption("--kills", type=int, default=32, help="how often tests of kills kill, in all (32)")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--run-slow"):
        return
    skip = pytest.mark.skip(reason="slow; add --run-slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)
