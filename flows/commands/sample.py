"""`cm sample` and `cm evaluate`: draw images from a trained model, and measure any images."""

import tempfile
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.commands.drawing import MODEL, Context, add_sampling_options, draw, is_model, save_images
from flows.commands.output import add_json_option, cannot_write, print_json, print_metrics
from flows.errors import UserError
from flows.stage_runner.progress import Bar
from flows.workspace.locations import workspace_root

if TYPE_CHECKING:
    import numpy as np

    from flows.data.dataset import Dataset
    from flows.data.feature_files import FeatureFiles

GRID_IMAGES = 100


def add_parsers(commands: Any) -> None:
    """Declare the subcommands."""
    parser = commands.add_parser("sample", help="draw images from a trained model")
    parser.add_argument("--model", metavar="MODEL", help=f"{MODEL}; default: out/student of the workspace")
    parser.add_argument(
        "--out",
        metavar="PATH",
        type=Path,
        default=Path("out/drawn"),
        help="a folder of PNGs, a file .npy, or one picture .png; default out/drawn",
    )
    add_sampling_options(parser, count=64)
    parser.set_defaults(command=sample)

    parser = commands.add_parser("evaluate", help="measure images, or a model, against the prepared data")
    parser.add_argument(
        "images", metavar="IMAGES", nargs="+", help=f"a folder, zip, tar, .npy or .npz of images; or a model: {MODEL}"
    )
    add_sampling_options(parser, count=1000)
    add_json_option(parser)
    parser.set_defaults(command=evaluate)


def sample(args: Namespace) -> None:
    """Write images and a grid of the first ones."""
    images, _, how, _ = draw(args.model or str(workspace_root() / "out" / "student"), args, Context())
    with cannot_write(args.out):
        if args.out.suffix == ".png" and not args.out.is_dir():
            write_grid(images, args.out)
            written = f"{min(len(images), GRID_IMAGES)} of {len(images)} images, {how}"
        else:
            grid = write_images(images, args.out)
            written = f"{len(images)} images, {how}; {grid} shows the first {min(len(images), GRID_IMAGES)}"
    print(f"{args.out}: {written}")


def write_images(images: "np.ndarray", out: Path) -> Path:
    """Write one array, or one PNG per image; return the path of the grid beside them."""
    import numpy as np

    from cm_core.checkpoint import whole_file

    if out.suffix == ".npy":
        with whole_file(out) as partial, partial.open("wb") as file:
            np.save(file, images)
    else:
        save_images(images, out)
    grid = out.parent / f"{out.name.removesuffix('.npy')}.png"
    write_grid(images, grid)
    return grid


def write_grid(images: "np.ndarray", path: Path) -> None:
    """Write the first images as one picture."""
    from cm_core.checkpoint import whole_file
    from flows.reports.figures import save_grid

    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        save_grid(images[:GRID_IMAGES], partial)


def evaluate(args: Namespace) -> None:
    """Print the metrics of every set of images against the reference, with held-out images, if any, for comparison."""
    from flows.data.dataset import load_dataset

    root = workspace_root()
    dataset = load_dataset(root / "out" / "prepare")
    sets = {"real (held out)": dataset.heldout_images} if len(dataset.heldout_images) else {}
    for where in args.images:
        sets[where] = draw(where, args, Context()).images if is_model(where) else read_images(where, dataset)
    rows, files = measure(sets, root)
    if args.json:
        print_json(
            {"network": files.short_name, "images": {name: len(images) for name, images in sets.items()}, "rows": rows}
        )
    else:
        counted = {f"{name} ({len(sets[name])})": row for name, row in rows.items()}
        print_metrics(counted, title=f"Against {files.described['images']}, measured by {files.short_name}")


def read_images(where: str, dataset: "Dataset") -> "np.ndarray":
    """Read images through the stage `prepare`, in the data set's channels; [N, H, W, C] of its shape."""
    import numpy as np

    from flows.data.sources.array import ArrayFile
    from flows.data.sources.image_files import Images
    from flows.stages.prepare import Data, prepare

    is_array = where.endswith((".npy", ".npz"))
    source = ArrayFile(path=where) if is_array else Images(path=where, labels="none")
    channels = "grey" if dataset.image_shape[0] == 1 else "rgb"
    with tempfile.TemporaryDirectory(prefix="cm-evaluate-") as scratch, Bar(f"reading {where}") as bar:
        prepare(Data(source=source, channels=channels, heldout_fraction=0), Path(scratch), bar)
        images = np.concatenate([np.load(Path(scratch) / f"{split}_images.npy") for split in ("train", "heldout")])
    if images.shape[1:] != dataset.train_images.shape[1:]:
        sizes = [f"{shape[1]}x{shape[0]}" for shape in (images.shape[1:], dataset.train_images.shape[1:])]
        raise UserError(f"{where}: the images are {sizes[0]}, those of the data set {dataset.name} are {sizes[1]}")
    return images


def measure(sets: "dict[str, np.ndarray]", root: Path) -> "tuple[dict[str, dict[str, float]], FeatureFiles]":
    """Return the metrics of every set of images, and what they were measured with."""
    from cm_core.metrics.evaluation import evaluate_images
    from cm_core.metrics.features import build_extractor
    from flows.data.feature_files import load_feature_files
    from flows.recipes.recipe import load_active
    from flows.stages.models import pick_device

    files, params, device = load_feature_files(root / "out" / "features"), load_active(root).evaluate, pick_device()
    extractor = build_extractor(files.extractor, files.weights, device)
    rows = {}
    for name, images in sets.items():
        with Bar(name) as bar:
            try:
                rows[name] = evaluate_images(
                    images,
                    files.reference,
                    extractor,
                    params=params,
                    batch_size=params.batch_size,
                    device=device,
                    on_batch=bar.progress,
                )
            except ValueError as error:
                raise UserError(f"{name}: {error}") from error
    return rows, files
