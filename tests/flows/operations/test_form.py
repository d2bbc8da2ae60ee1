"""The form of a recipe: its schema, and what both of Prefect's pages submit when its choices change.

Screenshots are kept in the folder of $CM_SCREENSHOTS, else in pytest's temporary folder.
"""

import json
import os
from functools import reduce
from itertools import combinations
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from browsers import chromium
from flows.operations.form import HIDDEN, LATE, ORDER, TABS, TITLES, form_of
from flows.recipes.recipe import Recipe, load_recipe, recipe_names
from live import log_in, worker
from miniature import REPOSITORY
from processes import wait_until
from schemas import unions

WIDTH = 1280  # of the window
OUTSIDE = "(all, width) => all.filter(one => one.getBoundingClientRect().right > width).map(one => one.innerText)"
PAGES = {"v1": "", "v2": "/v2"}  # Prefect's two user interfaces
TYPED = {"integer": 12, "number": 0.5, "string": "x"}  # into values that were empty


@pytest.fixture(scope="module")
def form():
    from flows.pipeline import consistency

    return form_of(consistency)


@pytest.fixture(scope="module")
def sections(form):
    return {"": form, **form["definitions"]}


def test_sections_come_in_the_order_of_need_and_the_method_first(sections):
    shown = {name: sorted(one["properties"], key=lambda key: one["properties"][key]["position"])
             for name, one in sections.items()}  # fmt: skip
    need = ["student", "data", "teacher", "base", "sample", "features", "evaluate", "edit", "noise", "network"]
    assert shown[""] == ["name", "recipe"] and shown["Recipe"] == ["seed", "conditional", *need]
    assert shown["Student"][:2] == ["method", "train"] and shown["Student"][-1] == "weights"


def test_every_field_has_a_title_of_its_own_and_none_is_optional(sections):
    for name, section in sections.items():
        titles = [field["title"] for field in section["properties"].values()]
        assert len(set(titles)) == len(titles), name
        assert all(title[0].isupper() or title[0] in "βγεσ" for title in titles), titles
        assert section["required"] == list(section["properties"])
    assert sections["CT"]["properties"]["s0"]["title"] == "Initial discretization steps s0"
    assert sections["Noise"]["properties"]["sigma_max"]["title"] == "Largest noise level σ_max"


def test_what_the_form_names_hides_and_orders_exists():
    schema = Recipe.model_json_schema()
    of_sections = {"Recipe": schema, **schema["$defs"]}
    fields = {(name, key) for name, one in of_sections.items() for key in one["properties"]} | {("", "name")}
    known = {key for _, key in fields} | {f"{name}.{key}" for name, key in fields} | {"recipe"}
    assert not {*HIDDEN, *LATE, *ORDER, *TITLES} - known
    assert not set(TABS) - {section.get("title") for section in of_sections.values()}


@pytest.mark.parametrize("name", recipe_names(REPOSITORY))
def test_the_form_takes_every_recipe_as_it_is(form, name):
    """The server refuses a run whose parameters do not fit it; what the form hides stays in them."""
    values = {"name": name, "recipe": load_recipe(name, root=REPOSITORY).model_dump(mode="json")}
    assert not list(Draft202012Validator(form).iter_errors(values))


def test_a_value_belongs_to_one_tab(form):
    """Both pages choose the tab that has most of a value's keys, of equals the first: it must be the right one."""
    found = list(unions(form))
    assert len(found) > 8
    for choices in found:
        keys = {choice: set(form["definitions"][choice]["properties"]) for choice in choices}
        for earlier, later in combinations(choices, 2):
            assert not keys[earlier] >= keys[later], f"{earlier} would be shown for {later}"


def hydrated(value):
    """Return what the server makes of a value that a page posts: v1 posts sections in a list as text."""
    return json.loads(value["value"]) if value.get("__prefect_kind") == "json" else value


class Page:
    """The form of a deployment on one of Prefect's pages, in a browser."""

    def __init__(self, page, up, form, version):
        self._page, self._form, self._version = page, form, version
        deployment = up.get("/deployments/name/consistency/tiny")
        self.before = deployment["parameters"]["recipe"]
        page.goto(f"{up.note['prefect']}{PAGES[version]}/deployments/deployment/{deployment['id']}/run")
        page.get_by_text("Grid points N").first.wait_for()
        assert page.get_by_role("button").or_(page.get_by_role("tab")).evaluate_all(OUTSIDE, WIDTH) == []
        page.route("**/create_flow_run", lambda route: route.fulfill(status=503, json={"detail": "not today"}))

    def change(self, turn):
        """Click an option of every union, the one `turn` places after its first; return {path: value chosen}."""
        self._turn, self.chosen = turn, {}
        self._change_section("Recipe", self._page.locator("body"), ())
        return self.chosen

    def submit(self):
        """Return the recipe that Submit posts."""
        with self._page.expect_request("**/create_flow_run") as sent:
            self._page.get_by_role("button", name="Submit").click()
        return json.loads(sent.value.post_data, object_hook=hydrated)["parameters"]["recipe"]

    def field(self, scope, title):
        """Return the field of this title."""
        if self._version == "v1":
            label = f"span[contains(@class,'schema-form-property__label')][normalize-space()='{title}']"
            box = "*[contains(concat(' ',@class,' '),' schema-form-property ')]"
        else:
            label, box = f"label[normalize-space()='{title}']", "div[contains(concat(' ',@class,' '),' group ')]"
        return scope.locator(f"xpath=.//{label}/ancestor::{box}[1]").first

    def _change_section(self, name, scope, path):
        for key, field in self._form["definitions"][name]["properties"].items():
            inside = self.field(scope, field["title"])
            if "anyOf" in field:
                self._change_union(field["anyOf"], inside, (*path, key))
            elif "$ref" in field:
                self._change_section(field["$ref"].rsplit("/", 1)[1], inside, (*path, key))
            elif key in ("path", "autoencoder"):  # they have no default
                inside.locator("textarea").fill("x")

    def _change_union(self, options, scope, path):
        option = options[self._turn % len(options)]
        name = option.get("$ref", "").rsplit("/", 1)[1:]
        resolved = self._form["definitions"][name[0]] if name else option
        if "enum" in resolved or resolved["type"] == "array":  # their values are no tabs
            return
        role = {"v1": "button", "v2": "tab"}[self._version]
        scope.get_by_role(role, name=resolved["title"], exact=True).first.click()
        if name:
            if kind := resolved["properties"].get("kind"):
                self.chosen[(*path, "kind")] = kind["default"]
            self._change_section(name[0], scope, path)
        elif value := TYPED.get(resolved["type"]):
            scope.locator("textarea" if value == "x" else "input").first.fill(str(value))
        if not name:
            self.chosen[path] = TYPED.get(resolved["type"])


@pytest.fixture(scope="module")
def browser(up):
    with chromium() as browser:
        page = browser.new_page(viewport={"width": WIDTH, "height": 1000})
        page.set_default_timeout(60_000)
        log_in(page, up)
        yield page


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory):
    return Path(os.environ.get("CM_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))


@pytest.mark.slow
@pytest.mark.parametrize("version", PAGES)
def test_what_is_chosen_is_what_is_submitted(up, browser, form, screenshots, version):
    page = Page(browser, up, form, version)
    browser.screenshot(path=screenshots / f"form-{version}.png")
    assert page.submit() == page.before, "the untouched form is the recipe"
    for turn in (1, 2):
        chosen = page.change(turn)
        posted = page.submit()
        browser.screenshot(path=screenshots / f"form-{version}-turn-{turn}.png")
        assert len(chosen) > 12
        assert {path: reduce(lambda tree, key: tree[key], path, posted) for path in chosen} == chosen


@pytest.mark.slow
def test_the_linked_page_refuses_a_value_at_its_field(up, browser, form):
    assert f"{up.note['prefect']}{PAGES['v2']}/deployments" in up.welcome.splitlines()[2]
    page, posted = Page(browser, up, form, "v2"), []
    browser.on("request", lambda request: posted.append(request.url.endswith("/create_flow_run")))
    images = page.field(browser, "Number of images").locator("input").first
    images.fill("0")
    browser.get_by_role("button", name="Submit").click()
    browser.wait_for_timeout(1000)
    assert images.evaluate("field => field.validationMessage") == "Value must be greater than or equal to 1."
    assert images.evaluate("field => field === document.activeElement"), "the page shows the field"
    assert not any(posted)
    images.fill("8")
    assert page.submit()["sample"]["num_images"] == 8


@pytest.mark.slow
def test_what_the_form_cannot_refuse_fails_at_once_with_its_reason(up):
    """Two sections that do not fit together."""
    deployment = up.get("/deployments/name/consistency/tiny")
    asked = deployment["parameters"] | {"recipe": deployment["parameters"]["recipe"] | {"teacher": None}}
    with worker(up, "a"):
        run_id = up.post(f"/deployments/{deployment['id']}/create_flow_run", parameters=asked)["id"]
        wait_until(lambda: up.flow_run(run_id)["state_name"] in ("Failed", "Completed"), every=1)
    assert up.states(run_id)[-1] == "Failed" and up.task_ends(run_id) == set()
    line = "tiny: recipe: student.method.kind=cd distils a teacher, and teacher is null; train one or use ct"
    assert up.flow_run(run_id)["state"]["message"] == line
    assert not [said for said in up.said(run_id) if "Traceback" in said]
