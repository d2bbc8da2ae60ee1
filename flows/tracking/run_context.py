"""The context of a stage's MLflow run, a parent run and shared tags, passed on in the environment."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from flows.settings import Settings


@dataclass(frozen=True)
class RunContext:
    """The flow's parent run and the tags that its stage runs share, from the environment."""

    parent_run_id: str | None = None
    tags: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls) -> "RunContext":
        """Read the flow's context; a stage started by `dvc repro` has none."""
        settings = Settings.read()
        return cls(settings.parent_run_id, settings.run_tags or {})

    def variables(self) -> dict[str, str]:
        """Return the environment variables that `read` reads."""
        parent = {"CM_PARENT_RUN_ID": self.parent_run_id} if self.parent_run_id else {}
        return {**parent, "CM_RUN_TAGS": json.dumps(self.tags)}

    @contextmanager
    def in_environment(self) -> Iterator[None]:
        """Pass this context to child processes started within the block."""
        before = {name: os.environ.get(name) for name in self.variables()}
        os.environ.update(self.variables())
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value
