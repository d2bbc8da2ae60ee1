"""Recipe files as they lie in a workspace; nothing heavy is imported to list them."""

from pathlib import Path

RECIPES_DIR = Path("params/recipes")


def first_comment(path: Path) -> str:
    """Return the first line of the comment that heads a file."""
    line = path.read_text(encoding="utf-8").partition("\n")[0]
    return line.lstrip("#").strip() if line.startswith("#") else ""
