"""Settings: every CM_* variable of the project is one of them, described in docs/settings.md, refused in one line."""

import dataclasses
import re

import pytest

from flows.errors import UserError
from flows.settings import Settings, variable
from miniature import REPOSITORY

SEARCHED = ("flows", "cm_core", "infra", "benchmarks", "docs", ".ci", "README.md", "Makefile", "dvc.yaml")
HISTORY = (REPOSITORY / "docs" / "LOG.md", REPOSITORY / "docs" / "adr")  # speak of variables that are gone


def sources():
    for name in SEARCHED:
        place = REPOSITORY / name
        for path in [place] if place.is_file() else place.rglob("*"):
            if (
                path.is_file()
                and not any(map(path.is_relative_to, HISTORY))
                and path.suffix not in (".pyc", ".png", ".npy")
            ):
                yield path


def test_every_variable_in_use_is_a_setting():
    known = {variable(one.name) for one in dataclasses.fields(Settings)}
    found = {path: set(re.findall(r"\bCM_[A-Z][A-Z_]*\b", path.read_text(errors="ignore"))) for path in sources()}
    unknown = {str(path): sorted(names - known) for path, names in found.items() if names - known}
    assert any(found.values()) and not unknown


def table():
    """The table of docs/settings.md, from the dataclass."""
    yield from ("| variable | default | meaning |", "| --- | --- | --- |")
    for one in sorted(dataclasses.fields(Settings), key=lambda one: one.metadata["internal"]):
        default = "" if one.default is None else f"`{int(one.default) if one.default is False else one.default}`"
        note = " Set by the pipeline itself." * one.metadata["internal"]
        yield f"| `{variable(one.name)}` | {default} | {one.metadata['doc']}{note} |"


def test_the_table_in_the_docs_is_that_of_the_dataclass():
    lines = (REPOSITORY / "docs" / "settings.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("|")] == list(table())


@pytest.fixture
def environment(monkeypatch):
    for one in dataclasses.fields(Settings):
        monkeypatch.delenv(variable(one.name), raising=False)
    return monkeypatch


def test_unset_and_empty_variables_have_their_defaults(environment):
    environment.setenv("CM_DEVICES", "")
    assert Settings.read() == Settings()
    environment.setenv("CM_DEVICES", "4")
    environment.setenv("CM_SHARD", "1")
    environment.setenv("CM_RUN_TAGS", '{"recipe": "mine"}')
    assert Settings.read() == Settings(devices=4, shard=True, run_tags={"recipe": "mine"})


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("CM_DEVICES", "two", "must be a number of devices, 1 or more"),
        ("CM_SHARD", "yes", "must be 1, to shard weights over processes, or 0"),
        ("CM_STATE", "ftp://a/b", "must be a folder of this machine or s3://bucket/prefix"),
        ("CM_RUN_TAGS", "[]", "must be a JSON object"),
        ("CM_RUN_TAGS", "{", "Expecting property name"),
    ],
)
def test_a_bad_value_is_refused_with_what_is_allowed(environment, name, value, allowed):
    environment.setenv(name, value)
    with pytest.raises(UserError, match=rf"^{re.escape(f'{name}={value}: {allowed}')}"):
        Settings.read()
