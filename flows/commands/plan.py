"""`cm plan`: estimate the cost of a recipe's trainings on CM_DEVICES GPUs."""

import math
from argparse import ArgumentTypeError, Namespace
from typing import TYPE_CHECKING, Any

from flows.commands.output import add_json_option, print_json, print_table
from flows.commands.recipes import add_recipe_arguments
from flows.errors import UserError
from flows.settings import Settings
from flows.workspace.locations import workspace_root

if TYPE_CHECKING:
    from flows.recipes.recipe import Recipe

# bf16 matrix products, FLOP/s, and memory, bytes. H100 and H200 as measured (docs/performance.md), A100 by its sheet.
GPUS = {"a100": (312e12, 80 << 30), "h100": (798e12, 80 << 30), "h200": (787e12, 140 << 30)}
EXPECTED_SHARE = 0.5  # of these products, in bf16: measured 0.47 to 0.55 (docs/performance.md)
FP32_SHARE = 0.05  # the same in fp32
TRAININGS = ("teacher", "base", "student")
COLUMNS = ("training", "parameters", "GFLOP an image", "images a step", "GiB a GPU", "images/s", "hours", "")


def add_parsers(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("plan", help="say what the trainings of a recipe cost: memory, speed, hours")
    add_recipe_arguments(parser)
    parser.add_argument("--gpu", choices=GPUS, help="a GPU by name; default: the one of this machine, else h100")
    parser.add_argument("--price", type=_price, metavar="AMOUNT", help="of an hour of one GPU, to say what all costs")
    add_json_option(parser)
    parser.set_defaults(command=plan)


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = -1.0
    if not 0 <= price < math.inf:
        raise ArgumentTypeError(f"{text!r} is not a price, 0 or more")
    return price


def plan(args: Namespace) -> None:
    """Print one row per training."""
    from flows.distributed.launch import processes_for
    from flows.recipes.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides, root=workspace_root())
    sections = {role: getattr(recipe, role) for role in TRAININGS if getattr(recipe, role) is not None}
    count = max(processes_for(role, section) for role, section in sections.items())
    rate, memory, name = _gpu(args.gpu)
    rows = [_row(role, recipe, rate, memory, count) for role in sections]
    hours = sum(row["hours"] for row in rows)
    cost = None if args.price is None else hours * count * args.price
    if args.json:
        total = {"hours": hours, "gpu_hours": hours * count, "cost": cost}
        print_json({"gpu": name, "count": count, "trainings": rows, "total": total})
        return
    table = [
        (
            row["training"],
            f"{row['parameters'] / 1e6:,.1f} M",
            f"{row['flops_per_image'] / 1e9:,.1f}",
            str(row["batch_size"]),
            f"{row['memory_bytes'] / 2**30:,.1f}",
            f"{row['images_per_s']:,.0f}",
            f"{row['hours']:,.1f}",
            row["advice"] or "fits",
        )
        for row in rows
    ]
    many = f"{count} x {name}, {memory / 2**30:.0f} GiB each"
    print_table(COLUMNS, table, title=f"One {name}, {memory / 2**30:.0f} GiB" if count == 1 else many)
    said = "" if cost is None else f"; at {args.price:g} an hour of one GPU: {cost:,.2f}"
    print(f"The trainings together: {hours:,.1f} hours, {hours * count:,.1f} GPU-hours{said}")


def _gpu(name: str | None) -> tuple[float, int, str]:
    import torch

    from cm_core.training.cost import matmul_rate

    if name is None and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        return matmul_rate(torch.device("cuda")), memory, torch.cuda.get_device_name()
    return *GPUS[name or "h100"], name or "h100"


def _row(role: str, recipe: "Recipe", rate: float, memory: int, count: int) -> dict[str, Any]:
    from cm_core.augment import LABEL_DIM
    from cm_core.model import ModelSpec, count_parameters
    from cm_core.training.cost import FP32, advice, step_cost

    section, shape = getattr(recipe, role), recipe.data.input_shape()
    if shape is None:
        missing = "data.latents.autoencoder: not here" if recipe.data.image_shape() else "data.resolution is empty"
        raise UserError(f"{missing}: the size of what networks see, and so the cost, is known after `prepare`")
    method, train = section.method, section.train
    classes = int(recipe.conditional)  # how many is known after `prepare`; each costs nothing
    told = {"image_shape": shape, "num_classes": classes, **(recipe.student.sampling() if role == "student" else {})}
    spec = ModelSpec(form=method.form, network=recipe.network, noise=recipe.noise, **told)
    if getattr(method, "augment", None):
        spec = spec.model_copy(update={"augment_dim": LABEL_DIM})
    if section.is_imported:
        nothing = dict.fromkeys(("flops_per_image", "batch_size", "memory_bytes", "images_per_s", "hours"), 0)
        facts = {"training": role, "parameters": count_parameters(spec), **nothing}
        return {**facts, "advice": "imported, not trained: costs nothing"}
    cost = step_cost(method, spec, num_emas=len(train.emas), bytes_per_value=2 if train.autocast else FP32)
    sharded = Settings.read().shard and count > 1
    images_per_s = count * rate * (EXPECTED_SHARE if train.autocast else FP32_SHARE) / cost.flops_per_train_image(train)
    return {
        "training": role,
        "parameters": cost.parameters,
        "flops_per_image": cost.flops_per_image,
        "batch_size": train.batch_size,
        "memory_bytes": cost.peak_bytes_among(count, train, sharded=sharded),
        "images_per_s": images_per_s,
        "hours": train.num_steps * train.batch_size / images_per_s / 3600,
        "advice": advice(cost, method, train, memory, role, count, sharded=sharded),
    }
