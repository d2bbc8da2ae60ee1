"""Metrics by row of images, the form in which people compare them."""

from collections.abc import Mapping

Metrics = Mapping[str, Mapping[str, float]]  # as in metrics.json: <metric>_<network> -> images -> value
Rows = dict[str, dict[str, float]]  # images -> metric -> value


def by_row(metrics: Metrics) -> tuple[str, Rows]:
    """Return the feature network and the metrics by row: {images: {metric: value}}."""
    rows: Rows = {}
    for key, values in metrics.items():
        metric, _, network = key.partition("_")
        for name, value in values.items():
            rows.setdefault(name, {})[metric] = value
    return network, rows
