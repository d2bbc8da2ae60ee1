"""`cm search`: find the noise levels at which a few-step student has the lowest FID."""

import json
import logging
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.commands.output import (
    add_json_option,
    log_to_terminal,
    positive,
    prepare_for_cancelling,
    print_json,
    print_table,
)
from flows.commands.recipes import add_recipe_arguments
from flows.errors import UserError
from flows.recipes.files import run_name
from flows.stage_runner.progress import Bar
from flows.tracking.stage_run import StageRun
from flows.tracking.tracker import Tracker
from flows.workspace.clone import Workspace, clone
from flows.workspace.dvc_files import ancestors, locked_outs, read_stages, version
from flows.workspace.git import describe_code
from flows.workspace.locations import workspace_root

if TYPE_CHECKING:
    from flows.recipes.recipe import Recipe

logger = logging.getLogger(__name__)
NEEDED = ("student", "features")  # artifacts that a search reads
NUM_IMAGES = 10_000  # (CM, App. C)
NUM_IMAGES_HELP = f"images a candidate, always of the same noise; default {NUM_IMAGES:,}, or as many as compared with"
NUM_SCALES = 40  # of the grid, where the method has none of its own (CM, section 6.1, for images of 64 pixels and more)
DIGITS = 4  # of a noise level: what is printed is exactly what was measured


def add_parsers(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("search", help="find the noise levels for a student of K network calls, by FID")
    add_recipe_arguments(parser)
    parser.add_argument("--nfe", metavar="K", type=positive, required=True, help="network calls an image, 2 or more")
    parser.add_argument("--num-images", metavar="N", type=positive, help=NUM_IMAGES_HELP)
    parser.add_argument(
        "--num-scales", metavar="N", type=positive, help=f"points of the grid; default: the method's, else {NUM_SCALES}"
    )
    parser.add_argument("--write", action="store_true", help="put the recipe with the levels found in force")
    add_json_option(parser)
    parser.set_defaults(command=search)


def search(args: Namespace) -> None:
    """Update the student and the feature network, search, and print the result."""
    from flows.recipes.recipe import load_recipe, write_active

    log_to_terminal()
    prepare_for_cancelling()
    root = workspace_root()
    recipe = load_recipe(args.recipe, args.overrides, root=root, base=Path.cwd())
    grid = make_grid(recipe, args.nfe, args.num_scales)
    if args.num_images == 1:
        raise UserError("--num-images 1: FID compares spreads, which takes 2 images or more")
    with clone(root, f"search {run_name(args.recipe, args.overrides)}") as workspace:
        write_active(recipe, workspace.root)
        entries = reproduce(workspace)
        found = find(recipe, grid, args, workspace, entries)
    report(recipe, found, args)


def make_grid(recipe: "Recipe", nfe: int, num_scales: int | None) -> list[float]:
    """Return the decreasing candidate noise levels; raise UserError if there is nothing to search."""
    method = recipe.student.method
    if method.form in ("euler", "generator"):
        raise UserError(f"student.method.kind={method.kind}: its training fixes the levels; there is nothing to search")
    count = num_scales or getattr(method, "num_scales", None) or NUM_SCALES  # methods without a fixed grid have None
    if not 2 <= nfe < count:
        raise UserError(f"--nfe {nfe}: must lie between 2 and {count - 1}, for a grid of {count} points (--num-scales)")
    return [float(f"{sigma:.{DIGITS}g}") for sigma in recipe.noise.grid(count).tolist()]


def reproduce(workspace: Workspace) -> dict[str, dict[str, Any]]:
    """Update the artifacts that a search needs, running only what is out of date; return the entries of dvc.lock."""
    stages = read_stages(workspace.root)
    wanted = {*NEEDED, *(name for needed in NEEDED for name in ancestors(stages[needed], stages))}
    entries = {}
    for name in (name for name in stages if name in wanted):
        result = workspace.reproduce(name)
        logger.info("%s: %s", name, "cached" if result.cached else f"done in {workspace.seconds[name]:.1f} s")
        entries[name] = result.entry
    return entries


def find(
    recipe: "Recipe", grid: Sequence[float], args: Namespace, workspace: Workspace, entries: Mapping[str, Any]
) -> dict[str, Any]:
    """Search, and log every candidate to an MLflow run; return the result as plain values."""
    from cm_core.search import Search

    scorer = Scorer(recipe, workspace.root, args.num_images)
    versions = {f"dvc.dep.{name}": version(locked_outs(entries[name])) for name in NEEDED}

    def tags() -> dict[str, str]:
        return {**describe_code(workspace.shared_root), "recipe": run_name(args.recipe, args.overrides), **versions}

    with StageRun(workspace.shared_root, "search", None, tags) as run:

        def score(indices: tuple[int, ...]) -> float:
            sigmas = [grid[index] for index in indices]
            fid = scorer.fid(sigmas, f"candidate {len(candidates.scores) + 1}: sigma {_words(sigmas)}")
            run.metrics({scorer.metric: fid}, len(candidates.scores))
            logger.info("search: sigma %s, %s %.4g", _words(sigmas), scorer.metric, fid)
            return fid

        candidates = Search(score)
        best = candidates.run(num_scales=len(grid), nfe=args.nfe)
        found = {
            "recipe": args.recipe,
            "nfe": args.nfe,
            "metric": scorer.metric,
            "num_images": scorer.num_images,
            "compared_with": scorer.compared_with,
            "grid": list(grid),
            "candidates": [
                {"indices": list(indices), "sigmas": [grid[index] for index in indices], "fid": fid}
                for indices, fid in candidates.scores.items()
            ],
            "best": {"indices": list(best), "sigmas": [grid[index] for index in best], "fid": candidates.scores[best]},
        }
        run.submit(partial(_log, recipe=recipe, found=found))
    return found


def _log(tracker: Tracker, run_id: str, *, recipe: "Recipe", found: Mapping[str, Any]) -> None:
    from flows.recipes.recipe import flatten

    settings = {f"search.{key}": found[key] for key in ("nfe", "num_images", "compared_with")} | {
        "search.num_scales": len(found["grid"])
    }
    tracker.log_params(run_id, {**flatten(recipe.model_dump(mode="json")), **settings})
    tracker.log_numbers(run_id, {f"best/{found['metric']}": found["best"]["fid"]})
    mid_sigmas = json.dumps(found["best"]["sigmas"][1:])
    tracker.set_tags(run_id, {"search.mid_sigmas": mid_sigmas, "mlflow.source.name": "cm search"})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "search.json"
        path.write_text(json.dumps(found, indent=2) + "\n")
        tracker.log_files(run_id, {path.name: path})


class Scorer:
    """A workspace's student and feature network: FID of images drawn at given levels.

    The levels are chosen by other images than those of the evaluation, so that its numbers stay unbiased: the noise
    has a seed of its own, and the reference is the held-out split where that has a full covariance.
    """

    def __init__(self, recipe: "Recipe", root: Path, num_images: int | None) -> None:
        from cm_core.metrics.evaluation import Reference
        from cm_core.metrics.features import build_extractor, extract_features
        from cm_core.model import load_model
        from cm_core.precision import autocast_dtype, set_float32_products
        from cm_core.randomness import derive_seed
        from flows.data.dataset import load_dataset
        from flows.data.feature_files import load_feature_files
        from flows.stages.models import pick_device, pixels_of

        files, self.sample, self.device = load_feature_files(root / "out" / "features"), recipe.sample, pick_device()
        self.batch_size, self.seed = recipe.evaluate.batch_size, derive_seed(recipe.sample.seed, "search")
        self.metric = f"fid_{files.short_name}"
        self.extractor = build_extractor(files.extractor, files.weights, self.device)
        dataset = load_dataset(root / "out" / "prepare")
        self.reference, self.compared_with = files.reference, files.described["images"]
        count = len(dataset.heldout_images)
        if count > len(files.reference.statistics.mu):
            with Bar("held-out images") as bar:
                found = extract_features(
                    dataset.heldout_images,
                    self.extractor,
                    batch_size=self.batch_size,
                    device=self.device,
                    on_batch=bar.progress,
                )
            self.reference, self.compared_with = Reference.of(found.features), f"{count} held-out images"
        else:
            count = len(dataset.train_images)
        self.num_images = num_images or min(NUM_IMAGES, count)
        set_float32_products(self.sample.precision)
        autocast = autocast_dtype(self.sample.precision)
        self.spec, self.f = load_model(root / "out" / "student", autocast=autocast)
        self.decode = pixels_of(self.spec, root / "out" / "student", self.device)

    def fid(self, sigmas: Sequence[float], title: str) -> float:
        """Return the FID of images drawn at these levels, with the same noise each time."""
        from cm_core.metrics.evaluation import frechet_distance
        from cm_core.metrics.features import extract_features
        from flows.inference.generate import draw_images
        from flows.stages.models import few_steps

        with Bar(title) as bar:
            images = draw_images(
                self.spec,
                self.f,
                partial(few_steps, self.spec, mid_sigmas=sigmas[1:]),
                n=self.num_images,
                seed=self.seed,
                device=self.device,
                batch_size=self.sample.batch_size,
                decode=self.decode,
                on_batch=bar.progress,
            )
            found = extract_features(images, self.extractor, batch_size=self.batch_size, device=self.device)
        return frechet_distance(found.features, self.reference)


def report(recipe: "Recipe", found: Mapping[str, Any], args: Namespace) -> None:
    """Print the candidates and the best one's overrides; with --write, update the active recipe."""
    from flows.recipes.recipe import load_recipe, write_active

    best, override = found["best"], set_override(found["best"]["sigmas"])
    rows = [
        (_words(one["sigmas"]), ", ".join(map(str, one["indices"])), f"{one['fid']:#.4g}", "best" * (one == best))
        for one in sorted(found["candidates"], key=lambda one: one["indices"])
    ]
    if args.json:
        print_json({**found, "set": override})
    else:
        title = f"{len(rows)} candidates, {found['num_images']:,} images each, against {found['compared_with']}"
        print_table(("sigma", "grid points", found["metric"], ""), rows, title=title, numbers=2)
        print(f"Use it with: --set {override}")
    if args.write:
        overrides = [*args.overrides, override]
        root = workspace_root()
        recipe, name = load_recipe(args.recipe, overrides, root=root, base=Path.cwd()), run_name(args.recipe, overrides)
        print(f"{write_active(recipe, root, name)}: holds {name}", file=sys.stderr)


def set_override(sigmas: Sequence[float]) -> str:
    """Return the --set values that sample with one call and at these levels."""
    return f"sample.mid_sigmas=[[],[{','.join(f'{sigma:g}' for sigma in sigmas[1:])}]]"


def _words(sigmas: Sequence[float]) -> str:
    return ", ".join(f"{sigma:g}" for sigma in sigmas)
