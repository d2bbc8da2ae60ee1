"""Who started a flow run, as far as Prefect knows."""

import uuid

import pytest
from prefect.client.schemas.objects import CreatedBy, FlowRun

from flows.orchestration import starter
from flows.tracking.person import KNOWN_BY, UNKNOWN, USER


def flow_run(**values):
    return FlowRun(flow_id=uuid.uuid4(), deployment_id=uuid.uuid4(), **values)


AUTOMATION = CreatedBy(id=uuid.uuid4(), type="AUTOMATION", display_value="nightly retry")


@pytest.mark.parametrize(
    ("values", "name", "known_by"),
    [
        ({}, UNKNOWN, "the server's password, which people share"),
        ({"auto_scheduled": True}, "schedule", "Prefect"),
        ({"created_by": AUTOMATION}, "nightly retry", "Prefect, automation"),
    ],
)
def test_a_run_from_a_server_is_not_booked_to_the_workers_account(values, name, known_by):
    assert starter._of_deployment(flow_run(**values)) == {USER: name, KNOWN_BY: known_by}


def test_a_tag_of_the_form_names_the_person():
    assert starter._said(flow_run(tags=["gpu", "user:ada"])) == {USER: "ada", KNOWN_BY: "tag of the flow run"}
    assert starter._said(flow_run(tags=["gpu"])) == {}
