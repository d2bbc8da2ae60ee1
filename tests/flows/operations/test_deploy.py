"""`deploy` twice on a real server: what a user has edited in between stays, what nobody touched follows."""

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentUpdate, GlobalConcurrencyLimitUpdate, WorkPoolUpdate
from prefect.testing.utilities import prefect_test_harness

from flows.errors import UserError
from flows.operations import deploy as module
from flows.operations.deploy import deploy, read_template
from miniature import REPOSITORY
from processes import WAIT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client():
    with prefect_test_harness(server_startup_timeout=int(WAIT)), get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def begin(client, monkeypatch):
    """A function that deploys two recipes as `cm up` does, on a server that knows nothing of it before."""
    monkeypatch.setattr("flows.recipes.recipe.recipe_names", lambda root: ["digits-cd", "digits-ct"])
    if client.read_variable_by_name(module.WRITTEN):
        client.delete_variable_by_name(module.WRITTEN)
        client.delete_work_pool("gpu")
        client.delete_global_concurrency_limit_by_name("gpu")

    def begin(pool_type="process", **options):
        deploy(REPOSITORY, pool_type=pool_type, pull_steps=[], **options)
        return client.read_global_concurrency_limit_by_name("gpu").limit, client.read_work_pool("gpu")

    return begin


def test_untouched_slots_follow_the_machine_and_chosen_ones_stay(client, begin):
    assert [begin(gpus_found=found)[0] for found in (2, 4, 1)] == [2, 4, 1]
    client.update_global_concurrency_limit("gpu", GlobalConcurrencyLimitUpdate(limit=3))
    assert [begin(gpus_found=found)[0] for found in (1, 2)] == [3, 3], "chosen in the server's page"
    assert begin(gpus=8)[0] == 8 and begin()[0] == 8, "chosen by cm deploy --gpus 8"


def test_an_edited_template_stays_and_an_untouched_one_follows_the_release(client, begin, monkeypatch, caplog):
    newer = read_template(REPOSITORY, "process")
    newer["variables"]["description"] = "a later release"
    before = begin()[1]
    monkeypatch.setattr(module, "read_template", lambda root, pool_type: newer)
    pool = begin()[1]
    assert pool.base_job_template["variables"]["description"] == "a later release"
    assert before.base_job_template != pool.base_job_template
    edited = {**newer, "variables": {**newer["variables"], "description": "by hand"}}
    client.update_work_pool("gpu", WorkPoolUpdate(base_job_template=edited, is_paused=True, concurrency_limit=7))
    for _ in range(2):
        caplog.clear()
        pool = begin()[1]
        assert pool.base_job_template == edited and (pool.is_paused, pool.concurrency_limit) == (True, 7)
        assert any("edited on the server, it stays so" in message for message in caplog.messages)
    pool = begin(overwrite=True)[1]
    assert pool.base_job_template == newer and (pool.is_paused, pool.concurrency_limit) == (True, 7)


def test_an_edited_automation_stays_and_an_untouched_one_follows_the_release(client, begin, monkeypatch, caplog):
    def found():
        return {one.name: one for name in names for one in client.read_automations_by_name(name)}

    names = [one.name for one in module.automations()]
    begin()
    first = found()
    begin()
    assert found() == first, "one that is as it should be is not written again"
    lost, again = names
    later = module.automations()
    client.update_automation(first[lost].id, later[0].model_copy(update={"enabled": False}))
    monkeypatch.setattr(module, "automations", lambda: [one.model_copy(update={"tags": ["later"]}) for one in later])
    for _ in range(2):
        caplog.clear()
        begin()
        assert (found()[lost].enabled, found()[lost].tags) == (False, [])
        assert (found()[again].enabled, found()[again].tags) == (True, ["later"])
        (line,) = [line for line in caplog.messages if line.startswith("automation")]
        assert line == f"automation '{lost}': edited on the server, it stays so; cm deploy --overwrite replaces it"
    begin(overwrite=True)
    assert (found()[lost].enabled, found()[lost].tags) == (True, ["later"])


def test_a_pool_of_another_type_is_refused(begin):
    begin()
    with pytest.raises(UserError, match=r"^work pool gpu: the server's is of the type process, not docker; delete it"):
        begin("docker")


def test_deployments_that_differ_are_written_and_no_other(client, begin):
    def found():
        return [client.read_deployment_by_name(f"consistency/{name}") for name in ("digits-cd", "digits-ct")]

    def written(before):
        return [one.updated > other.updated for one, other in zip(found(), before, strict=True)]

    begin()
    first = found()
    begin()
    assert written(first) == [False, False]
    cd = first[0]
    client.update_deployment(cd.id, DeploymentUpdate(description="by hand", tags=[*cd.tags, "mine"]))
    edited = found()
    begin()
    assert written(edited) == [True, False]
    again = found()[0]
    assert (again.id, again.description, again.tags) == (cd.id, cd.description, [*cd.tags, "mine"])
