"""JSON schemas of recipes and forms."""


def unions(node):
    """Yield the names of the sections of every union in a schema."""
    if isinstance(node, dict):
        refs = [option["$ref"].rsplit("/", 1)[1] for option in node.get("anyOf", []) if "$ref" in option]
        if len(refs) > 1:
            yield refs
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else []:
        yield from unions(child)
