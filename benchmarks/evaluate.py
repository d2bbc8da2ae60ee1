"""Time the evaluation of generated images against real ones with classifier features, each part on its own.

python -m benchmarks.evaluate                                          # 50,000 against 50,000, on the GPU
python -m benchmarks.evaluate --images 1347 --size 8 --width 16        # the digits, on a laptop
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import hardware, report, synchronise
from cm_core.metrics.classifier import Classifier, save_classifier
from cm_core.metrics.evaluation import (
    MetricParams,
    Reference,
    _inception_score,
    _kernel_distance,
    _precision_recall,
    frechet_distance,
)
from cm_core.metrics.features import build_extractor, extract_features
from flows.stages.models import pick_device

PARTS = {
    "fid": lambda found, reference, params: frechet_distance(found.features, reference),
    "is": lambda found, reference, params: _inception_score(found.logits, params),
    "kid": lambda found, reference, params: _kernel_distance(found.features, reference.features, params),
    "precision, recall": lambda found, reference, params: _precision_recall(found.features, reference.features, params),
}


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--images", type=int, default=50_000, help="images of each set")
    arguments.add_argument("--size", type=int, default=32, help="height and width of the images")
    arguments.add_argument("--width", type=int, default=64, help="of the classifier; features have four times as many")
    arguments.add_argument("--json", action="store_true", help="print JSON")
    args = arguments.parse_args(argv)
    device, rows = pick_device(), []
    shape = (args.images, args.size, args.size, 3)
    real, generated = (np.random.default_rng(seed).integers(0, 256, shape, np.uint8) for seed in (0, 1))
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.safetensors"
        save_classifier(Classifier((3, args.size, args.size), num_classes=10, width=args.width).eval(), weights)
        extractor = build_extractor("classifier", weights, device)

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        synchronise(device)
        rows.append({"part": part, "seconds": time.perf_counter() - started})

    def extract(images: np.ndarray) -> Any:
        return extract_features(images, extractor, batch_size=250, device=device)

    with timed("features of the reference, once a data set"):
        features = extract(real).features
    with timed("statistics of the reference, once a data set"):
        reference = Reference.of(features)
    with timed("features"):
        found = extract(generated)
    params = MetricParams().adapted_to(args.images, reference)
    for part, measure in PARTS.items():
        with timed(part):
            measure(found, reference, params)
    own = [row["seconds"] for row in rows if "once" not in row["part"]]
    rows.append({"part": "all of a set of images", "seconds": sum(own)})
    report(args, hardware() | {"images": args.images}, rows)


if __name__ == "__main__":
    main()
