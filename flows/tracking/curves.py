"""Curves on a pipeline run: losses and FID of its stages, whichever run computed them."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path

from flows.reports.metrics_table import CURVES, Metrics, fid_against_nfe

TRAININGS = ("teacher", "base", "student")
Curves = dict[str, list[tuple[int, float]]]  # key -> (step, value)


def loss_key(stage: str) -> str:
    """Return the key of a training's loss on the pipeline run."""
    return f"{CURVES}{stage}_loss"


def curves_of(files: Mapping[str, Path], metrics: Metrics) -> Curves:
    """Return the curves of a pipeline's outputs, `files` {stage/path: file}.

    Losses lie over optimiser steps, `fid_against_nfe` over network calls, `fid_over_training_*` over optimiser steps.
    """
    found: Curves = {}
    for stage in TRAININGS:
        if log := files.get(f"{stage}/metrics.jsonl"):
            entries = [json.loads(line) for line in log.read_text().splitlines()]
            found[loss_key(stage)] = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    found[f"{CURVES}fid_against_nfe"] = fid_against_nfe(metrics)
    if table := files.get("evaluate/plots/fid_over_training.csv"):
        with table.open(newline="") as rows:
            for row in csv.DictReader(rows):
                key = f"{CURVES}fid_over_training_{row['row']}"
                found.setdefault(key, []).append((int(row["step"]), float(row["fid"])))
    return {key: points for key, points in found.items() if points}
