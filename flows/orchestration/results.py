"""Prefect's stored results, read as JSON alone.

A stored record names the serializer that reads it: pickle, or a module and a callable of any name. Anyone who can
write to the store, which may be a bucket, could have each worker run code. Prefect has no setting against it.
"""

import json

from prefect.results import ResultRecord, ResultRecordMetadata
from prefect.serializers import JSONSerializer, Serializer


def read_json_alone() -> None:
    """Make this process read stored results as JSON, whatever they ask for; others count as absent."""
    ResultRecord.deserialize = classmethod(_read_json)  # type: ignore[assignment, method-assign]


def _read_json(cls: type[ResultRecord], data: bytes, backup_serializer: Serializer | None = None) -> ResultRecord:
    """Return a record. Raises ValueError or TypeError if it is not one of JSON, which `ResultStore.exists` expects."""
    record = json.loads(data)
    # Not even validated: that imports the modules which a serializer names.
    metadata = ResultRecordMetadata(**{**record["metadata"], "serializer": JSONSerializer()})
    return cls(metadata=metadata, result=json.loads(record["result"]))
