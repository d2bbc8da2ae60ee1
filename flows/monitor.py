"""The interface by which a running stage reports to its caller."""

from collections.abc import Mapping
from pathlib import Path

PROFILE_VARIABLE = "CM_PROFILE"  # a folder for profiles of trainings; a parameter would make another training of one


class Monitor:
    """Receiver of a stage's progress, metrics, pictures and remarks; this one ignores them all (tests, notebooks).

    `cm stage` passes one that draws a progress bar and logs to MLflow.
    """

    def progress(self, done: int, total: int, unit: str) -> None:
        """Report that `done` of `total` units (images, steps) are finished."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers of an optimiser step; also those that may not enter an artifact, such as images/s."""

    def image(self, key: str, path: Path, step: int) -> None:
        """Show a picture that the stage has written, e.g. a sample grid during training."""

    def remark(self, text: str) -> None:
        """Report one line for people, e.g. from which step a training resumes."""

    def state_saved(self) -> None:
        """Report that the folder of training states holds another complete one."""

    def stop_requested(self) -> bool:
        """Whether the stage should save its state and stop (the run was cancelled)."""
        return False
