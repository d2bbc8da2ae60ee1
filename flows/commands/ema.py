"""`cm ema`: a model with an average of its weights of another width, rebuilt from a training's snapshots."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from flows.commands.drawing import MODEL, locate
from flows.commands.output import add_json_option, cannot_write, print_json
from flows.errors import UserError


def add_parsers(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("ema", help="rebuild an average of the weights of any width, after the training")
    parser.add_argument("model", metavar="MODEL", help=f"{MODEL}; trained with train.snapshots")
    parser.add_argument(
        "--width",
        metavar="W",
        type=float,
        required=True,
        help="standard deviation of the averaged steps, relative to the training's length, such as 0.08",
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="the folder to write; default out/ema/NAME-W")
    add_json_option(parser)
    parser.set_defaults(command=ema)


def ema(args: Namespace) -> None:
    """Write model.json, ema.safetensors and origin.json; say how close the average is."""
    import json

    from cm_core.model import save_model
    from flows.stages.models import ORIGIN_FILE, copy_decoder
    from flows.stages.sample import load_rebuilt

    folder = locate(args.model)
    out = args.out or Path("out/ema") / f"{folder.resolve().name}-{args.width:g}"
    try:
        spec, model, error = load_rebuilt(folder, args.width)
    except (FileNotFoundError, ValueError) as problem:  # no model, or a damaged one
        raise UserError(f"{problem}; a model is a folder such as out/student, or models:/... of MLflow") from problem
    facts = {"snapshots_of": args.model, "width": args.width, "profile_error": round(error, 6)}
    with cannot_write(out):
        out.mkdir(exist_ok=True)
        copy_decoder(spec, folder, out)
        (out / ORIGIN_FILE).write_text(json.dumps(facts, indent=2) + "\n")
        save_model(out, spec, model.state_dict())  # last: it makes the folder a model
    if args.json:
        print_json({"folder": str(out), **facts})
        return
    print(f"{out}: an average of width {args.width:g}, its profile {error:.2%} off; `cm sample --model {out}` draws")
