"""`cm --print-completion SHELL`: a shell's completion script, which shtab derives from the parser."""

from argparse import Action, ArgumentParser, Namespace, _SubParsersAction
from collections.abc import Iterator
from typing import Any

SHELLS = ("bash", "zsh")
# Shell commands that complete an argument, by its metavar; they list file names, so that Tab starts no Python.
_PAGES = 'ls "$(git rev-parse --show-toplevel 2>/dev/null)/params/{}" 2>/dev/null | sed -n "s/[.]yaml$//p"'
WORDS = {
    "RECIPE": _PAGES.format("recipes"),
    "SWEEP": _PAGES.format("sweeps"),
    "RUN": "echo champion candidate; " + _PAGES.format("recipes"),  # a recipe names its newest run
    "STAGE": "echo prepare features teacher base student sample edit evaluate",
}
FILES = ("PATH", "FOLDER", "IMAGE", "MASK")


class PrintCompletion(Action):
    """Print the script and exit, as --help does."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: str | None = None
    ) -> None:
        import shtab

        argument: Any  # shtab reads an attribute that argparse does not know
        for argument in _arguments(parser):
            if isinstance(argument, _SubParsersAction):
                argument.help = None  # `cm --help` lists the commands by itself
            if argument.metavar in WORDS:
                argument.complete = _lister(f"_cm_{argument.metavar}", WORDS[argument.metavar])
            elif argument.metavar in FILES:
                argument.complete = shtab.FILE
        print(shtab.complete(parser, values))
        parser.exit()


def _lister(name: str, command: str) -> dict[str, Any]:
    """Return the shell function `name`, which offers the words that a command prints."""
    bash, zsh = f'{name}() {{ compgen -W "$({command})" -- "$1"; }}', f"{name}() {{ compadd -- $({command}); }}"
    return {**dict.fromkeys(SHELLS, name), "preamble": {"bash": bash, "zsh": zsh}}


def _arguments(parser: ArgumentParser) -> Iterator[Action]:
    """Yield the arguments of a parser and of its subcommands."""
    for action in parser._actions:
        yield action
        if isinstance(action, _SubParsersAction):
            for below in action.choices.values():
                yield from _arguments(below)
