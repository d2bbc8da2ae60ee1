"""The lineage of a model: data, code and recipe, the stages and what they made, as an SVG or as Mermaid."""

from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 138, 44, 44, 18, 8  # pixels, of boxes and between them
INK, LINE, PLAIN, STALE = "#222222", "#8a8f98", "#f4f6fa", "#fde8d7"
SHORT = 8  # characters of a version
BASE = "base"  # the stage that a recipe may do without


class Node(NamedTuple):
    """A thing with its version, made of others."""

    name: str
    version: str
    after: tuple[str, ...] = ()
    stale: bool = False


def code_of(tags: Mapping[str, str]) -> str:
    """Return a short name of the code that the tags of a run describe."""
    return tags.get("git.revision", "unknown")[:SHORT] + (" + edits" if "git.edits" in tags else "")


def lineage(
    sources: Mapping[str, str],
    upstream: Mapping[str, Sequence[str]],
    versions: Mapping[str, str],
    *,
    model: str,
    stale: Collection[str] = (),
    has_base: bool = True,
) -> list[Node]:
    """Return the nodes, each after those it is made of; without a base its stage has made nothing, and is left out.

    `sources` are {data, code, recipe: version}; they go into every stage, and are drawn before the first. `upstream`
    are {stage: the stages it reads} in order, `versions` those of what they made, `model` is the student's name.
    """
    if not has_base:
        upstream = {name: [one for one in inputs if one != BASE] for name, inputs in upstream.items() if name != BASE}
    nodes = [Node(name, version, stale=name in stale) for name, version in sources.items()]
    for stage, inputs in upstream.items():
        made = versions.get(stage, "")[:SHORT] or "not made yet"
        nodes.append(Node(stage, made, _direct(inputs, upstream) or tuple(sources), stage in stale))
    return nodes + [Node("model", model, (node.name,), node.stale) for node in nodes if node.name == "student"]


def _direct(inputs: Sequence[str], upstream: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return the inputs that are no inputs of other inputs, so that a picture has few lines."""
    indirect = {name for one in inputs for name in _all_before(one, upstream)}
    return tuple(name for name in inputs if name not in indirect)


def _all_before(name: str, upstream: Mapping[str, Sequence[str]]) -> set[str]:
    return {one for before in upstream[name] for one in (before, *_all_before(before, upstream))}


def mermaid(nodes: Sequence[Node]) -> str:
    """Return a flowchart in Mermaid's language, which GitHub draws; what is stale is dashed."""
    names = {node.name: f"n{number}" for number, node in enumerate(nodes)}
    lines = [f'  {names[node.name]}["{_quoted(node.name)}<br>{_quoted(node.version)}"]' for node in nodes]
    lines += [f"  {names[before]} --> {names[node.name]}" for node in nodes for before in node.after]
    if outdated := [names[node.name] for node in nodes if node.stale]:
        lines += [f"  classDef stale fill:{STALE},stroke-dasharray:4", f"  class {','.join(outdated)} stale"]
    return "\n".join(["flowchart LR", *lines])


def _quoted(text: str) -> str:
    return text.replace("#", "#35;").replace('"', "#quot;").replace("<", "#lt;")


def svg(nodes: Sequence[Node]) -> str:
    """Return a picture: columns from the sources to the model, dashed where a new run would make something else."""
    columns: dict[str, int] = {}
    for node in nodes:
        columns[node.name] = 1 + max((columns[name] for name in node.after), default=-1)
    rows = {column: [one.name for one in nodes if columns[one.name] == column] for column in sorted(columns.values())}
    height = max(map(len, rows.values())) * (HEIGHT + GAP_Y) - GAP_Y + 2 * MARGIN
    width = len(rows) * (WIDTH + GAP_X) - GAP_X + 2 * MARGIN
    corner = {}
    for column, names in rows.items():
        top = (height - len(names) * (HEIGHT + GAP_Y) + GAP_Y) / 2
        for row, name in enumerate(names):
            corner[name] = MARGIN + column * (WIDTH + GAP_X), top + row * (HEIGHT + GAP_Y)
    lines = [_line(corner[before], corner[node.name]) for node in nodes for before in node.after]
    boxes = [_box(node, *corner[node.name]) for node in nodes]
    style = 'style="max-width: 100%; height: auto" font-family="system-ui, sans-serif" font-size="12"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:g}" width="{width}" role="img" '
        f'aria-label="Lineage" text-anchor="middle" {style}>'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(lines + boxes)}</svg>'
    )


def _line(start: tuple[float, float], end: tuple[float, float]) -> str:
    x, y, to_x, to_y = start[0] + WIDTH, start[1] + HEIGHT / 2, end[0], end[1] + HEIGHT / 2
    bend = GAP_X / 2
    path = f"M{x:g} {y:g}C{x + bend:g} {y:g} {to_x - bend:g} {to_y:g} {to_x:g} {to_y:g}"
    return f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1.4"/>'


def _box(node: Node, x: float, y: float) -> str:
    fill, dashes = (STALE, ' stroke-dasharray="4"') if node.stale else (PLAIN, "")
    middle = x + WIDTH / 2
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="{fill}" stroke="{LINE}"{dashes}/>'
        f'<text x="{middle:g}" y="{y + 18:g}" fill="{INK}" font-weight="600">{escape(node.name)}</text>'
        f'<text x="{middle:g}" y="{y + 34:g}" fill="{INK}" font-size="11">{escape(_fitted(node.version))}</text>'
    )


def _fitted(text: str, most: int = 22) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
