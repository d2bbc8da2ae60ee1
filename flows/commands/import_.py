"""`cm import`: read a public checkpoint into a folder that every command takes as a model."""

import json
import tempfile
from argparse import Namespace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from flows.commands.drawing import LOGGED, locate
from flows.commands.output import add_json_option, cannot_write, positive, print_json
from flows.errors import UserError
from flows.stage_runner.progress import Bar
from flows.storage.s3 import public_uri

if TYPE_CHECKING:
    from cm_core.formats.base import Checkpoint

FORMS = ("denoiser", "skip", "unshifted")  # of public checkpoints


def add_parsers(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("import", help="read a public checkpoint: EDM, ECT, OpenAI, diffusers, or one of ours")
    parser.add_argument(
        "source", metavar="FILE|URI", help="a file or folder, file://, https://, s3://, or models:/... of MLflow"
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="the folder to write; default out/imported/NAME")
    parser.add_argument("--sha256", metavar="SUM", help="the checksum that the file must have")
    parser.add_argument(
        "--form",
        choices=FORMS,
        help="what the network is, where the file does not say: a denoiser, or a consistency "
        "function with its boundary at sigma_min (skip) or at 0 (unshifted)",
    )
    parser.add_argument("--resolution", metavar="N", type=positive, help="height of the images, where it is not said")
    parser.add_argument(
        "--channels-per-head", metavar="N", type=positive, help="width of an attention head, where it is not said; 64"
    )
    add_json_option(parser)
    parser.set_defaults(command=import_)


def import_(args: Namespace) -> None:
    """Write model.json, ema.safetensors and origin.json; say what the file is."""
    from cm_core.formats.base import Hints, UnreadableCheckpoint
    from cm_core.formats.read import read_checkpoint
    from cm_core.model import count_parameters, save_model
    from flows.reports.model_card import describe
    from flows.stages import weights
    from flows.stages.models import ORIGIN_FILE, copy_decoder
    from flows.storage.locate import locate as locate_weights

    name = PurePosixPath(urlsplit(args.source).path).stem
    out = args.out or Path("out/imported") / name
    source = str(locate(args.source)) if args.source.startswith(LOGGED) else args.source
    with tempfile.TemporaryDirectory(prefix="cm-import-") as scratch, Bar(f"reading {name}") as bar:
        path, sha256 = locate_weights(source, Path(scratch), args.sha256, bar)
        try:
            found = read_checkpoint(path, Hints(args.form, args.resolution, args.channels_per_head))
        except UnreadableCheckpoint as error:
            raise UserError(f"{public_uri(args.source)}: {str(error).partition(': ')[2]}") from error
        facts = {"weights": public_uri(args.source), **weights.origin(sha256, found)}
        with cannot_write(out):
            out.mkdir(exist_ok=True)
            copy_decoder(found.spec, path if path.is_dir() else path.parent, out)
            (out / ORIGIN_FILE).write_text(json.dumps(facts, indent=2) + "\n")
            save_model(out, found.spec, found.weights)  # last: it makes the folder a model
    parameters = count_parameters(found.spec)
    if args.json:
        told = {"folder": str(out), "parameters": parameters, **facts, "attention": found.attention}
        print_json({**told, "spec": found.spec.model_dump(mode="json")})
        return
    print(f"{out}: {found.format}, {describe(found.spec)}, {parameters / 1e6:,.1f} M parameters")
    if found.spec.network.kind != "mlp":
        print(f"  {_attention(found)}")
    print(f"  licence: {found.licence}; SHA-256 {sha256}")
    role = "teacher" if found.spec.form == "denoiser" else "student"
    print(f"  cm sample --model {out} draws; in a recipe: {role}: {{weights: {facts['weights']}, sha256: {sha256}}}")


def _attention(found: "Checkpoint") -> str:
    """Say where a network attends, in which heads, and how the file has them."""
    network: Any = found.spec.network
    places = ", ".join([*map(str, network.attn_resolutions), "the middle"])
    per_head = getattr(network, "channels_per_head", None)
    heads = f"heads of {per_head} channels" if per_head else "one head"
    return f"attention at {places}: {heads}; in the file, queries, keys and values are {found.attention}"
