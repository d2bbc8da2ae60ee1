"""A miniature workspace: a git repository with four trivial stages, shaped like the real pipeline."""

import os
import sqlite3
import subprocess
import tarfile
from contextlib import closing
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SUPPORT = Path(__file__).parent


def python_path(*first):
    """Return the PYTHONPATH of a process that imports what these folders hold, the tests' helpers, and what we can."""
    return os.pathsep.join(map(str, [*first, SUPPORT, os.environ.get("PYTHONPATH", "")]))


PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="  # a PNG

STAGE = """
import base64, os, pathlib, sys, time

name, *inputs = sys.argv[1:]
out = pathlib.Path("out") / name
out.mkdir(parents=True, exist_ok=True)
print(f"hello from {name}", flush=True)
(out / "begun").write_text("")
if os.environ.get("MINI_TRACE"):
    with open(os.environ["MINI_TRACE"], "a") as trace:
        trace.write(f"{name} {time.time()} {os.getpid()}\\n")
if name == os.environ.get("MINI_REFUSES"):
    print("params/active.yaml: seed=1: must be larger", file=sys.stderr)
    sys.exit(2)
if name == os.environ.get("MINI_CRASHES"):
    raise ZeroDivisionError
crash = pathlib.Path(os.environ.get("MINI_CRASHES_ONCE", "/nowhere"))
if crash.name == name and not crash.exists():
    crash.touch()
    raise ZeroDivisionError
if os.environ.get("CM_PROGRESS_FILE"):
    (out / "progress").write_text('{"done": 1, "total": 4, "unit": "steps"}')
    (out / "progress").replace(os.environ["CM_PROGRESS_FILE"])
time.sleep(float(os.environ.get("MINI_SECONDS", 0)))
awaited, deadline = set(os.environ.get("MINI_AWAITS", "").split()), time.monotonic() + 300
while awaited - {line.split()[0] for line in open(os.environ.get("MINI_TRACE", os.devnull))}:
    assert time.monotonic() < deadline, "they do not run side by side"
    time.sleep(0.05)
(out / "begun").unlink()
(out / "below").mkdir()
(out / "below" / "\\N{LATIN SMALL LETTER A WITH DIAERESIS}.txt").write_text("")
texts = [pathlib.Path(path, "result.txt").read_text() for path in inputs]
(out / "result.txt").write_text(name + pathlib.Path("params/active.yaml").read_text() + "".join(texts))
if name == "evaluate":
    (out / "metrics.json").write_text('{"fid_classifier": {"real": 0.5, "nfe_1": 2.5}}')
    (out / "result.txt").unlink()
    (out / "below" / "plot.png").write_bytes(base64.b64decode("PICTURE"))
""".replace("PICTURE", PICTURE)

STAGES = """
stages:
  prepare:
    cmd: python stage.py prepare
    deps: [stage.py]
    params:
    - params/active.yaml: [seed]
    outs: [out/prepare]
  features:
    cmd: python stage.py features out/prepare
    deps: [out/prepare, stage.py]
    params:
    - params/active.yaml: [features]
    outs: [out/features]
  teacher:
    cmd: python stage.py teacher out/prepare
    deps: [out/prepare, stage.py]
    params:
    - params/active.yaml: [seed, teacher]
    outs: [out/teacher]
  evaluate:
    cmd: python stage.py evaluate out/features out/teacher
    deps: [out/features, out/teacher, stage.py]
    metrics: [out/evaluate/metrics.json]
    outs: [out/evaluate/below]
"""

# A recipe, of which the stages above read no more than seed, features and teacher.
ACTIVE = """seed: 1
teacher:
student: {method: {kind: ct}}
features: {kind: classifier, learning_rate: 1.0e-05}
conditional: false
"""


def traced(path: Path) -> list[list[str]]:
    """Return the stages that have begun, each with its time and process id: what they wrote to $MINI_TRACE."""
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def make_bare_workspace(root: Path) -> Path:
    """Make the folder a workspace without stages, recipes or history."""
    (root / "params").mkdir()
    (root / "dvc.yaml").write_text("stages: {}\n")
    return root


def make_workspace(root: Path) -> Path:
    """Write and commit the miniature workspace at `root`, with the real DVC configuration."""
    files = {"stage.py": STAGE, "dvc.yaml": STAGES, "params/active.yaml": ACTIVE, ".gitignore": "/out/\n/.cm/\n"}
    for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore"):
        files[name] = (REPOSITORY / name).read_text()
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    commit(root)
    return root


def commit(root: Path) -> None:
    git(root, "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "--quiet", "--all", "-m", "state")


def git(root: Path, *arguments: str) -> str:
    """Run git, shielded from a git command around the tests."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    return subprocess.run(["git", *arguments], cwd=root, env=env, check=True, capture_output=True, text=True).stdout


def two_machines(first: Path) -> tuple[Path, Path]:
    """Return a workspace and a clone of it: the same code and nothing else in common."""
    second = first.with_name("second")
    git(first.parent, "clone", "--quiet", str(first), second.name)
    return first, second


def save_untrained(folder: Path, **what: object) -> None:
    """Save a model of a small network with random weights; fresh ones end in zeros, whose images would be alike."""
    import torch

    from cm_core.model import ModelSpec, save_model
    from cm_core.networks import MLPParams
    from cm_core.noise import Noise

    spec = ModelSpec(network=MLPParams(), noise=Noise(), **what)
    torch.manual_seed(0)
    model = spec.build()
    with torch.no_grad():
        for weights in model.parameters():
            weights.normal_(0, 0.1)
    folder.mkdir(parents=True)
    save_model(folder, spec, model.state_dict())


def save_adm(folder, form, classes=10, noise_scale=1000.0, network=None, noise=None):
    """Save an ADM of 16x16 colour images with random weights in a form; return its folder."""
    import torch

    from cm_core.model import ModelSpec, save_model
    from cm_core.networks import DhariwalUNetParams
    from cm_core.noise import Noise

    small = {"channels": 32, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (8,), "channels_per_head": 16}
    spec = ModelSpec(
        form=form,
        network=network or DhariwalUNetParams(**small, norm_groups=32),
        noise=noise or Noise(),
        image_shape=(3, 16, 16),
        num_classes=classes,
        noise_scale=noise_scale,
    )
    torch.manual_seed(0)
    model = spec.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder.mkdir()
    save_model(folder, spec, model.state_dict())
    return str(folder)


def unpack_registered_student(root: Path) -> None:
    """Write a workspace with a registered student, models:/cm-digits@champion, of an earlier version of the code."""
    packed = REPOSITORY / "tests" / "fixtures" / "logged_before_wings"
    (root / "params").mkdir(parents=True)
    (root / "dvc.yaml").write_text("stages: {}\n")
    with closing(sqlite3.connect(root / "mlflow.db")) as database:
        database.executescript((packed / "mlflow.sql").read_text().replace("@ROOT@", str(root)))
    with tarfile.open(packed / "model.tar.gz") as archive:
        archive.extractall(root, filter="data")
