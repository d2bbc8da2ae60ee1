"""MLflow's model registry: every measured student is a version, `candidate` the newest, `champion` the best.

A version's tags carry its metrics, its data version and a digest of its evaluation protocol. Metrics of different
protocols are never compared.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flows.errors import UserError
from flows.reports.metrics_table import STUDENT, by_row, of_student, renamed
from flows.settings import Settings
from flows.tracking.run_queries import FEATURES
from flows.tracking.tracker import Tracker, all_pages

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

CANDIDATE, CHAMPION = "candidate", "champion"
LARGER_IS_BETTER = {"fid": False, "kid": False, "is": True, "precision": True, "recall": True}
DATA_TAG, PROTOCOL_TAG, MODEL_TAG, RUN_TAG, PROMOTED_TAG = "data", "protocol", "model_id", "run_id", "promoted"
PAGE = 1000  # versions per request


@dataclass(frozen=True)
class Rule:
    """The metric and direction that rank versions."""

    metric: str
    row: str

    @classmethod
    def in_force(cls) -> "Rule":
        """Read the rule from CM_CHAMPION_METRIC, else use the default. Raises UserError for an unknown metric."""
        text = Settings.read().champion_metric
        row, _, metric = text.partition("/")
        if metric not in LARGER_IS_BETTER or not row.startswith(STUDENT):
            allowed = f"nfe_N/{'|'.join(LARGER_IS_BETTER)}, such as {Settings.champion_metric}"
            raise UserError(f"CM_CHAMPION_METRIC={text}: expected {allowed}")
        return cls(metric, row)

    @property
    def key(self) -> str:
        """The metric's key, such as nfe_1/fid."""
        return f"{self.row}/{self.metric}"

    def cost(self, version: "Version") -> float:
        """Return a number that is smaller for a better version; infinite if the metric is missing."""
        value = version.numbers.get(self.key)
        if value is None:
            return math.inf
        return -value if LARGER_IS_BETTER[self.metric] else value


@dataclass(frozen=True)
class Version:
    """A registered model version: its metrics and what they are comparable with."""

    number: int
    data: str
    protocol: str
    numbers: Mapping[str, float]
    model_id: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, found: "ModelVersion") -> "Version":
        """Read one of MLflow's versions; a version registered by other software has no metrics."""
        tags = dict(found.tags)
        numbers = renamed({key: float(text) for key, text in tags.items() if "/" in key and STUDENT in key})
        data, protocol = tags.get(DATA_TAG, ""), tags.get(PROTOCOL_TAG, "")
        return cls(int(found.version), data, protocol, numbers, tags.get(MODEL_TAG), tags)

    def is_comparable_with(self, other: "Version") -> bool:
        """Whether both were measured by the same protocol on the same data."""
        return (self.data, self.protocol) == (other.data, other.protocol)


@dataclass(frozen=True)
class Registered:
    """One registered model: versions by number, aliases, and the latest promotion by a user."""

    name: str
    versions: dict[int, Version]
    aliases: Mapping[str, int]
    promoted: int | None = None
    promoted_among: int = 0  # the newest version at the promotion; only later ones may replace the promoted one

    @property
    def champion(self) -> Version | None:
        """The version with the alias `champion`."""
        return self.versions.get(self.aliases.get(CHAMPION, 0))

    def rightful_champion(self, rule: Rule) -> Version | None:
        """Return the best version among those comparable with the reigning one.

        The reigning version is the promoted one, else the first. Depends only on the registry, so all callers agree.
        """
        scored = [version for version in self.versions.values() if rule.cost(version) < math.inf]
        base = self.versions.get(self.promoted or 0) or min(scored, key=lambda version: version.number, default=None)
        if base is None:
            return None
        after = self.promoted_among if base.number == self.promoted else 0
        rivals = [version for version in scored if version.number > after and version.is_comparable_with(base)]
        return min([base, *rivals], key=lambda version: (rule.cost(version), version.number))


class Registry:
    """MLflow's registry as the pipeline uses it."""

    def __init__(self, tracker: Tracker) -> None:
        self._client, self._rule = tracker.client, Rule.in_force()

    def register(
        self, name: str, model_id: str, numbers: Mapping[str, float], tags: Mapping[str, str], description: str = ""
    ) -> Version:
        """Register a measured model, unless it is registered already; then update `candidate` and `champion`.

        `tags` hold at least the data version and the protocol; `description` is markdown.
        """
        self._create(name)
        known = (version for version in self.read(name).versions.values() if version.model_id == model_id)
        same = (
            version for version in known if (version.data, version.protocol) == (tags[DATA_TAG], tags[PROTOCOL_TAG])
        )
        version = next(same, None) or self._add(name, model_id, numbers, tags, description)
        self._settle(name)
        return version

    def _create(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _add(
        self, name: str, model_id: str, numbers: Mapping[str, float], tags: Mapping[str, str], description: str
    ) -> Version:
        texts = {key: repr(value) for key, value in numbers.items()}
        everything = {**tags, **texts, MODEL_TAG: model_id}  # a search does not return a version's model_id
        source, at_once = f"models:/{model_id}", 0  # a version in a database is ready at once
        found = self._client.create_model_version(
            name,
            source,
            tags=everything,
            model_id=model_id,
            description=description,
            await_creation_for=at_once,
        )
        return Version.read(found)

    def _settle(self, name: str) -> None:
        """Move the aliases to the right versions, checking again after each move: other runs end concurrently.

        The last writer has read the versions after all other moves, so the alias ends at the right one.
        """
        from mlflow.exceptions import MlflowException

        while True:
            registered = self.read(name)
            wanted = {CANDIDATE: max(registered.versions)}
            rightful, reigning = registered.rightful_champion(self._rule), registered.champion
            if rightful and (reigning is None or reigning.is_comparable_with(rightful)):
                wanted[CHAMPION] = rightful.number
            moves = {alias: number for alias, number in wanted.items() if registered.aliases.get(alias) != number}
            if not moves:
                return
            try:
                for alias, number in moves.items():
                    self._client.set_registered_model_alias(name, alias, str(number))
            except MlflowException:  # the database refuses one of two concurrent creations of an alias
                if self.read(name).aliases == registered.aliases:
                    raise

    def promote(self, name: str, number: int, *, force: bool) -> None:
        """Make a version the champion; with `force` also a worse or incomparable one.

        Raises UserError for a version that does not exist, or that needs `force`.
        """
        registered = self.read(name)
        version = registered.versions.get(number)
        if version is None:
            raise UserError(f"{name}: no version {number}; there are {', '.join(map(str, registered.versions))}")
        if not force:
            self._refuse_worse(name, version, registered.champion)
        promotion = json.dumps({"version": number, "among": max(registered.versions)})
        self._client.set_registered_model_tag(name, PROMOTED_TAG, promotion)
        self._client.set_registered_model_alias(name, CHAMPION, str(number))

    def _refuse_worse(self, name: str, version: Version, champion: Version | None) -> None:
        if champion is None:
            return
        label = f"{name} version {version.number}"
        if not version.is_comparable_with(champion):
            raise UserError(
                f"{label} was measured on other data or by another protocol than the champion, version "
                f"{champion.number}; --force promotes it all the same"
            )
        costs, key = (self._rule.cost(version), self._rule.cost(champion)), self._rule.key
        if costs[0] > costs[1]:
            numbers = ["not measured" if cost == math.inf else f"{abs(cost):.4g}" for cost in costs]
            raise UserError(
                f"{label} is worse than the champion, version {champion.number}: {key} {numbers[0]} against "
                f"{numbers[1]}; --force promotes it all the same"
            )

    def names(self) -> list[str]:
        """Return the names of the registered models, sorted."""
        return sorted(model.name for model in all_pages(self._client.search_registered_models, max_results=PAGE))

    def read(self, name: str) -> Registered:
        """Read one registered model. Raises UserError if there is none."""
        from mlflow.exceptions import MlflowException

        try:
            model = self._client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise UserError(
                f"no registered model {name!r}; there are {', '.join(self.names()) or 'none yet'}"
            ) from None
        found = all_pages(self._client.search_model_versions, f"name = '{name}'", max_results=PAGE)
        versions = {version.number: version for version in sorted(map(Version.read, found), key=lambda v: v.number)}
        aliases = {alias: int(number) for alias, number in model.aliases.items()}
        promotion = json.loads(model.tags.get(PROMOTED_TAG, "{}"))
        return Registered(name, versions, aliases, promotion.get("version"), promotion.get("among", 0))


def model_name(dataset: str) -> str:
    """Return the registered name of a data set's students, such as cm-digits."""
    return f"cm-{re.sub(r'[^A-Za-z0-9_-]+', '-', dataset).strip('-')}"


def champion_of(tracker: Tracker, dataset: str) -> int | None:
    """Return the version of a data set's champion, None before the first."""
    registry, name = Registry(tracker), model_name(dataset)
    return registry.read(name).aliases.get(CHAMPION) if name in registry.names() else None


def protocol_digest(protocol: Mapping[str, Any]) -> str:
    """Return a digest of the parts of protocol.json that make two students' metrics comparable."""
    settings = {key: value for key, value in protocol["settings"].items() if key != "batch_size"}
    images = sorted({row["num_images"] for row in protocol["rows"].values() if row["model"] == "student"})
    alike = {key: protocol[key] for key in ("reference", "samples", "torch_fidelity")}
    network = {key: value for key, value in protocol["network"].items() if key not in ("layer", "resize")}
    alike["network"] = network  # its name decides the other two, which earlier versions' digests lack
    text = json.dumps({**alike, "settings": settings, "num_images": images}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def register_student(
    tracker: Tracker,
    model_id: str,
    *,
    dataset: str,
    data_version: str,
    protocol: Mapping[str, Any],
    metrics: Mapping[str, Any],
    tags: Mapping[str, str],
    description: str = "",
) -> tuple[str, Version]:
    """Register the student of a measured run; return the registered model's name and version."""
    name = model_name(dataset)
    measured = {DATA_TAG: data_version, PROTOCOL_TAG: protocol_digest(protocol), FEATURES: by_row(metrics)[0]}
    return name, Registry(tracker).register(name, model_id, of_student(metrics), {**tags, **measured}, description)
