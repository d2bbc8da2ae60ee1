"""`cm export --to hub`: a folder of the Hugging Face Hub with a model card, uploaded when asked."""

import shutil
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from flows.commands.drawing import LOGGED, Context, add_sampling_options, draw, load, locate, refuse_latents
from flows.commands.output import cannot_write
from flows.commands.runs import tracker_of
from flows.errors import UserError
from flows.workspace.locations import workspace_root

if TYPE_CHECKING:
    from cm_core.model import ModelSpec
    from cm_core.precond import Precond
    from flows.reports.model_card import Card

PICTURED = 16  # images of a grid that is drawn for the card


def export_to_hub(args: Namespace) -> None:
    """Write weights, the files of diffusers where it has such a model, README.md, and what the card shows; upload."""
    from cm_core.formats.single import write_single
    from flows.reports.model_card import WEIGHTS_FILE, render_hub

    out = args.out or Path("out/hub")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}: is not empty, and all in it would be uploaded; remove it or give another")
    if args.push:
        _refuse_without_token(args.push)
    spec, model = load(args.model)
    refuse_latents(spec, args.model, "--to hub")
    card, logged = _find_card(args.model)
    card = card.model_copy(update={"licence": args.licence or card.licence})
    with cannot_write(out):
        out.mkdir(exist_ok=True)
        write_single(out / WEIGHTS_FILE, spec, model.state_dict())
        diffusers = _write_diffusers(out, spec, model)
        (out / "README.md").write_text(render_hub(card, repository=args.push or "OWNER/NAME", diffusers=diffusers))
        _write_what_it_shows(out, logged, args.model)
    print(f"{out}: README.md, {WEIGHTS_FILE}{'' if diffusers is None else ' and the files of diffusers'}")
    if logged is None:
        print("  its card has no metrics: MLflow knows no measurement of these weights")
    if args.push:
        print(f"  {_push(out, args.push)}")


def _find_card(model: str) -> "tuple[Card, Path | None]":
    """Return the card of a model and the folder in which it was logged; a short one if MLflow has none."""
    from flows.tracking.model_card import imported_card, read_card
    from flows.workspace.dvc_files import dvc_md5

    folder = locate(model)
    if not model.startswith(LOGGED):
        try:
            root = workspace_root()
        except UserError:  # a model in a folder can be exported anywhere
            return imported_card(folder), None
        tracker = tracker_of(root)
        logged = tracker.find_student(dvc_md5(folder)) if tracker else None
        if logged is None:
            return imported_card(folder), None
        folder = locate(f"models:/{logged}")
    return read_card(folder) or (imported_card(folder), None)


def _write_diffusers(out: Path, spec: "ModelSpec", model: "Precond") -> str | None:
    """Write the folder of diffusers; return the arguments with which it draws, None if it has no such model."""
    from cm_core.formats.unet2d import draws_with, write_diffusers

    try:
        write_diffusers(out, spec, model.state_dict())
    except ValueError:  # its card says so
        return None
    return draws_with(spec)


def _write_what_it_shows(out: Path, logged: Path | None, model: str) -> None:
    from flows.reports.figures import save_grid
    from flows.reports.model_card import PICTURE, RECIPE_FILE

    if logged is not None:
        for name in (PICTURE, RECIPE_FILE):
            shutil.copyfile(logged / name, out / name)
    else:
        options = ArgumentParser()
        add_sampling_options(options, count=PICTURED)
        options.set_defaults(mid_sigmas=[])
        save_grid(draw(model, options.parse_args([]), Context()).images, out / PICTURE)


def _refuse_without_token(repository: str) -> None:
    """Raise UserError before time is spent if nothing can be uploaded."""
    try:
        from huggingface_hub import get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id
    except ImportError as error:
        raise UserError("--push needs the package huggingface_hub: pip install huggingface_hub") from error
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--push {repository}: {' '.join(str(error).split())}") from error
    if "/" not in repository:
        raise UserError(f"--push {repository}: expected OWNER/NAME")
    if get_token() is None:
        raise UserError(f"--push {repository}: no token of the Hub; set HF_TOKEN, or `hf auth login`")


def _push(folder: Path, repository: str) -> str:
    """Upload the folder in one commit; return where it is."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # of the HTTP library that it uses

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        return api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by cm export").repo_url
    except (HTTPError, OSError) as error:
        raise UserError(f"--push {repository}: {' '.join(str(error).split())[:300]}; {folder} is written") from error
