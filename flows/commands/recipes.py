"""`cm recipes`, `cm show`, `cm use`: list and inspect recipes, and make one the active recipe."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from flows.commands.output import add_json_option, print_json, print_table
from flows.recipes.files import RECIPES_DIR, first_comment, names_in, run_name
from flows.workspace.locations import workspace_root


def add_parsers(commands: Any) -> None:
    """Declare the subcommands."""
    parser = commands.add_parser("recipes", help="list the recipes")
    add_json_option(parser)
    parser.set_defaults(command=recipes)

    parser = commands.add_parser("show", help="show every value of a recipe and where it comes from")
    add_recipe_arguments(parser)
    add_json_option(parser)
    parser.set_defaults(command=show)

    parser = commands.add_parser("use", help="put a recipe in force: write params/active.yaml, which dvc.yaml reads")
    add_recipe_arguments(parser)
    parser.set_defaults(command=use)


def add_recipe_arguments(parser: Any) -> None:
    """Add the arguments RECIPE and --set."""
    parser.add_argument("recipe", metavar="RECIPE", help="a name of `cm recipes`, or a path to a .yaml file")
    add_override_option(parser, "a value")


def add_override_option(parser: Any, what: str) -> None:
    """Add --set, which overrides values of `what`."""
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help=f"change {what}, such as student.method.solver=euler; may be given more than once",
    )


def recipes(args: Namespace) -> None:
    """List the recipes by name with the first line of each file."""
    folder = workspace_root() / RECIPES_DIR
    found = {name: first_comment(folder / f"{name}.yaml") for name in names_in(folder)}
    if args.json:
        print_json([{"name": name, "summary": summary} for name, summary in found.items()])
        return
    width = max(map(len, found), default=0)
    for name, summary in found.items():
        print(f"{name:{width}}  {summary}".rstrip())


def show(args: Namespace) -> None:
    """Show key, value and source of every value."""
    from flows.recipes.recipe import explain, yaml_text

    values = explain(args.recipe, args.overrides, root=workspace_root())
    if args.json:
        print_json([{"key": key, "value": value, "source": source} for key, value, source in values])
    else:
        print_table(("key", "value", "from"), [(key, yaml_text(value), source) for key, value, source in values])


def use(args: Namespace) -> None:
    """Write the resolved recipe to params/active.yaml."""
    from flows.recipes.recipe import load_recipe, write_active

    root, name = workspace_root(), run_name(args.recipe, args.overrides)
    path = write_active(load_recipe(args.recipe, args.overrides, root=root, base=Path.cwd()), root, name)
    print(f"{path}: holds {name}; `cm why` says what `dvc repro` will do")
