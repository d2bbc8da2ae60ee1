"""What a running stage tells whoever started it."""

from collections.abc import Mapping
from pathlib import Path

PROFILE_VARIABLE = "CM_PROFILE"  # a folder for profiles of trainings; a parameter would make another training of one


class Monitor:
    """Receives progress, metrics, pictures and remarks of a stage; this one ignores them all.

    Tests and notebooks pass `Monitor()`. `cm stage` passes one that draws a bar and logs to MLflow.
    """

    def progress(self, done: int, total: int, unit: str) -> None:
        """Say that `done` of `total` units (images, steps) are finished."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers measured at an optimiser step; also those that may not enter an artifact, such as images/s."""

    def image(self, key: str, path: Path, step: int) -> None:
        """Show a picture that the stage has written, e.g. a sample grid during training."""

    def remark(self, text: str) -> None:
        """Say one line that a person should read, e.g. from which step a training resumes."""

    def state_saved(self, state_dir: Path) -> None:
        """A complete training state now lies in `state_dir`."""

    def stop_requested(self) -> bool:
        """Whether the stage should save its state and end (the run was cancelled)."""
        return False
