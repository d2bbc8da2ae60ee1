"""The command that repeats a run leads to its recipe."""

import shlex

import pytest

from flows.recipes.naming import called, command, title
from flows.recipes.recipe import load_recipe
from miniature import REPOSITORY


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["seed=3", "sample.mid_sigmas=[[], [0.5], [2.0, 0.5]]"],
        ["student.method={kind: ict, s0: 4}"],
        ["teacher=null", "student.method=ct", "data.source={kind: array, path: 'some where.npz'}"],
        ["base={method: {kind: cmt, num_steps: 8}, train: {num_steps: 7}}", "student.method=ect"],
        ["base={}"],
    ],
)
def test_the_command_leads_to_the_same_recipe(overrides):
    recipe = load_recipe("digits-cd", overrides, root=REPOSITORY)
    name = called(recipe, "digits-cd", REPOSITORY)
    line = command(recipe, name, REPOSITORY).replace("\\\n", "")  # as a shell reads it
    program, verb, file, *settings = shlex.split(line)
    assert [program, verb, file] == ["cm", "run", "digits-cd"] and set(settings[::2]) <= {"--set"}
    assert load_recipe(file, settings[1::2], root=REPOSITORY) == recipe


def test_a_recipe_without_a_file_has_no_such_command():
    assert command(load_recipe("digits-cd", root=REPOSITORY), "edited", REPOSITORY) is None


def test_a_base_is_a_part_of_the_title():
    recipe = load_recipe("digits-cd", ["base.method=cmt", "student.method=ect"], root=REPOSITORY)
    assert title(recipe, "digits-cd") == "digits-cd · cmt then ect"
    assert called(recipe, "digits-cd", REPOSITORY) == "digits-cd base.method.kind=cmt student.method.kind=ect"
