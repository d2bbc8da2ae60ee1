"""What the MLflow run of a stage belongs to: a parent run and the tags it shares, handed on by the environment."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from flows.settings import Settings


@dataclass(frozen=True)
class RunContext:
    """What a stage's run belongs to: the flow's parent run and the tags it shares, from the environment."""

    parent_run_id: str | None = None
    tags: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls) -> "RunContext":
        """Read what a flow passed on; a stage started by `dvc repro` belongs to nothing."""
        settings = Settings.read()
        return cls(settings.parent_run_id, settings.run_tags or {})

    def variables(self) -> dict[str, str]:
        """Return the environment variables that `read` reads."""
        parent = {"CM_PARENT_RUN_ID": self.parent_run_id} if self.parent_run_id else {}
        return {**parent, "CM_RUN_TAGS": json.dumps(self.tags)}

    @contextmanager
    def in_environment(self) -> Iterator[None]:
        """Let what this process starts meanwhile belong to it."""
        before = {name: os.environ.get(name) for name in self.variables()}
        os.environ.update(self.variables())
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value
