"""Stage `base`: train the model from which the student starts, in the way of a student; or nothing."""

from pathlib import Path

from cm_core.networks import Network
from cm_core.noise import Noise
from flows.monitor import Monitor
from flows.stages.models import present, write_absent
from flows.stages.student import Student, train_student


def base(
    seed: int,
    conditional: bool,
    noise: Noise,
    network: Network,
    base: Student | None,
    prepare_dir: Path,
    teacher_dir: Path,
    out_dir: Path,
    state_dir: Path,
    monitor: Monitor,
) -> None:
    """Train or import the base and write its EMA weights; for a recipe without base write a marker file.

    Raises UserError if a needed teacher is absent.
    """
    if base is None:
        write_absent(out_dir, "base", monitor)
        return
    shared, earlier = (seed, conditional, noise, network), present(teacher=teacher_dir)
    train_student("base", *shared, base, prepare_dir, earlier, out_dir, state_dir, monitor)
