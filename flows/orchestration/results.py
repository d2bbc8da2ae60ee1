"""Prefect's stored results: read as JSON alone, and never an exception in the place of a result.

A stored record names the serializer that reads it: pickle, or a module and a callable of any name. Anyone who can
write to the store, which may be a bucket, could have each worker run code. Prefect has no setting against it.
"""

import json
from uuid import uuid4

from prefect.client.schemas.objects import State
from prefect.results import ResultRecord, ResultRecordMetadata, get_result_store
from prefect.serializers import JSONSerializer, Serializer
from prefect.states import Failed


def read_json_alone() -> None:
    """Make this process read stored results as JSON, whatever they ask for; others count as absent."""
    ResultRecord.deserialize = classmethod(_read_json)  # type: ignore[assignment, method-assign]


def _read_json(cls: type[ResultRecord], data: bytes, backup_serializer: Serializer | None = None) -> ResultRecord:
    """Return a record. Raises ValueError or TypeError if it is not one of JSON, which `ResultStore.exists` expects."""
    record = json.loads(data)
    # Not even validated: that imports the modules which a serializer names.
    metadata = ResultRecordMetadata(**{**record["metadata"], "serializer": JSONSerializer()})
    return cls(metadata=metadata, result=json.loads(record["result"]))


def refused(error: Exception) -> State:
    """Return a failed state that says the error's line alone, and whose result raises it.

    Prefect stores what a task returns under its cache key, an exception in a failed state as well, and would skip the
    next run of the task for it. A record with a key of its own is stored under that.
    """
    return Failed(message=str(error), data=get_result_store().create_result_record(error, key=uuid4().hex))
