"""The documentation names every page, shows modules that exist, and links to files that exist."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
HISTORY = [DOCS / "LOG.md", ROOT / "CHANGELOG.md", *DOCS.glob("adr/*.md")]  # these speak of the code of their day


def nav_pages(node):
    if isinstance(node, str):
        return [node]
    children = node if isinstance(node, list) else node.values()
    return [page for child in children for page in nav_pages(child)]


def test_the_site_names_every_page_once():
    named = nav_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(named) == [page.relative_to(DOCS).as_posix() for page in PAGES]


def test_every_module_of_the_api_pages_exists():
    modules = [name for page in PAGES for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)]
    assert len(modules) > 10
    missing = [name for name in modules if not module_file(name).exists()]
    assert missing == []


def module_file(name):
    path = ROOT.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[\w-]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_paths_in_code_spans_exist():
    """A page that names `flows/...` or `cm_core/...` after a move would send its reader nowhere."""
    for page in set(TEXTS) - set(HISTORY):
        named = re.findall(r"`((?:flows|cm_core|tests|params|infra|benchmarks)/[\w./-]+)`", page.read_text())
        assert [path for path in named if "NAME" not in path and not (ROOT / path).exists()] == [], page.name


@pytest.mark.parametrize(
    ("schema", "pattern"),
    [
        ("citation-file-format", "CITATION.cff"),
        ("github-workflows", ".github/workflows/*.yml"),
        ("github-issue-forms", ".github/ISSUE_TEMPLATE/[!c]*.yml"),
        ("github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
    ],
)
def test_files_for_the_host_fit_their_schemas(schema, pattern):
    files = sorted(map(str, ROOT.glob(pattern)))
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert files and done.returncode == 0, done.stdout


def test_the_version_is_the_same_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"## {version} - " in (ROOT / "CHANGELOG.md").read_text()
