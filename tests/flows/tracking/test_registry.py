"""The model registry: who is champion, whatever order runs end in, and what only a person may decide."""

import json
import threading

import pytest
from mlflow.exceptions import MlflowException

from command import run
from flows.errors import UserError
from flows.tracking.registry import Registered, Registry, Rule, Version, model_name, protocol_digest
from flows.tracking.tracker import Tracker
from miniature import make_bare_workspace
from servers import mlflow_server

FID = Rule("fid", "nfe_1")


def version(number, fid, *, data="d", protocol="p", row="nfe_1"):
    return Version(number, data, protocol, {} if fid is None else {f"{row}/fid": fid})


def rightful(*versions, promoted=None, among=0, rule=FID):
    registered = Registered("cm-x", {one.number: one for one in versions}, {}, promoted, among)
    champion = registered.rightful_champion(rule)
    return champion and champion.number


def test_the_best_measured_alike_is_the_rightful_champion():
    assert rightful() is None and rightful(version(1, None)) is None
    assert rightful(version(1, 3.0), version(2, 2.0), version(3, 2.5)) == 2
    assert rightful(version(1, 2.0), version(2, 2.0)) == 1, "equal is not better"
    others = [version(2, 1.0, data="e"), version(3, 1.0, protocol="q"), version(4, 0.1, row="nfe_2")]
    assert rightful(version(1, 3.0), *others) == 1, "other numbers say nothing"
    assert rightful(version(1, None), version(2, 3.0)) == 2


def test_a_promoted_version_reigns_until_a_later_one_is_better():
    known = [version(1, 1.0), version(2, 3.0), version(3, 2.0)]
    assert rightful(*known, promoted=2, among=3) == 2
    assert rightful(*known, version(4, 3.5), promoted=2, among=3) == 2
    assert rightful(*known, version(4, 2.5), promoted=2, among=3) == 4
    assert rightful(*known, version(4, 0.5, data="e"), promoted=2, among=3) == 2
    assert rightful(*known[:1], promoted=2, among=3) == 1, "the promoted version was deleted"


def test_the_rule_can_be_another_metric(monkeypatch):
    assert Rule.in_force() == FID
    monkeypatch.setenv("CM_CHAMPION_METRIC", "nfe_2/recall")
    recalls = [Version(n, "", "", {"nfe_2/recall": value}) for n, value in ((1, 0.5), (2, 0.75))]
    assert rightful(*recalls, rule=Rule.in_force()) == 2
    for text in ("nfe_1/loss", "fid", "real/fid", "fid/nfe_1"):
        monkeypatch.setenv("CM_CHAMPION_METRIC", text)
        with pytest.raises(UserError, match=f"CM_CHAMPION_METRIC={text}: expected nfe_N/fid"):
            Rule.in_force()


def test_names_and_protocols():
    assert model_name("digits") == "cm-digits" and model_name("my pictures: 2/3") == "cm-my-pictures-2-3"
    protocol = {
        "reference": {"sha256": "1"},
        "network": {"sha256": "2"},
        "samples": {"seed": 0},
        "torch_fidelity": "0.4.0",
        "settings": {"prc_images": 5, "batch_size": 250},
        "rows": {"nfe_1": {"model": "student", "num_images": 9}, "teacher": {"model": "teacher", "num_images": 4}},
    }
    same = json.loads(json.dumps(protocol))
    same["network"] |= {"layer": "2048", "resize": "none"}  # by the network's name, and absent from earlier versions
    same["settings"]["batch_size"], same["rows"]["teacher"]["num_images"] = 100, 7
    assert protocol_digest(same) == protocol_digest(protocol)
    for section, key, value in (
        ("settings", "prc_images", 6),
        ("network", "sha256", "3"),
        ("reference", "sha256", "2"),
    ):
        other = {**protocol, section: {**protocol[section], key: value}}
        assert protocol_digest(other) != protocol_digest(protocol)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_bare_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture
def tracker(root, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(root)
    return Tracker(root)


def log_model(tracker):
    """Log a model without files and return its id."""
    model = tracker.client.create_logged_model(tracker.experiment_id, "student")
    return tracker.client.finalize_logged_model(model.model_id, "READY").model_id


def register(tracker, name, fid, *, data="d", protocol="p", model_id=None, run_id="r"):
    tags = {"data": data, "protocol": protocol, "run_id": run_id, "recipe": "digits", "method": "cd"}
    numbers = {"nfe_1/fid": fid}
    return Registry(tracker).register(name, model_id or log_model(tracker), numbers, tags).number


def aliases(tracker, name):
    return Registry(tracker).read(name).aliases


def test_aliases_follow_what_is_registered_and_what_is_promoted(tracker, capsys):
    name, first = "cm-digits", log_model(tracker)
    assert register(tracker, name, 3.0, model_id=first) == 1
    assert register(tracker, name, 3.0, model_id=first) == 1, "the same model, measured alike, is registered once"
    assert register(tracker, name, 4.0) == 2 and aliases(tracker, name) == {"candidate": 2, "champion": 1}
    assert register(tracker, name, 2.0) == 3 and aliases(tracker, name) == {"candidate": 3, "champion": 3}
    assert register(tracker, name, 1.0, protocol="q", model_id=first) == 4
    assert aliases(tracker, name) == {"candidate": 4, "champion": 3}

    code, _, err = run(capsys, "models", "promote", name, "2")
    assert code == 2 and "version 2 is worse than the champion, version 3: nfe_1/fid 4 against 2" in err
    code, _, err = run(capsys, "models", "promote", name, "4")
    assert code == 2 and "by another protocol" in err and err.count("\n") == 1
    assert aliases(tracker, name)["champion"] == 3
    assert run(capsys, "models", "promote", name, "2", "--force")[0] == 0
    assert aliases(tracker, name)["champion"] == 2
    assert register(tracker, name, 5.0) == 5 and aliases(tracker, name) == {"candidate": 5, "champion": 2}
    assert register(tracker, name, 3.5) == 6 and aliases(tracker, name) == {"candidate": 6, "champion": 6}
    for argv, words in (
        (("cm-none", "1"), "no registered model 'cm-none'"),
        ((name, "9"), "no version 9; there are 1"),
    ):
        code, _, err = run(capsys, "models", "promote", *argv)
        assert code == 2 and words in err and err.count("\n") == 1


def test_a_run_that_is_overtaken_before_it_moves_an_alias_corrects_itself(tracker, monkeypatch):
    """A better version is registered, and crowned, between another run's look at the registry and its move."""
    name, move, moved = "cm-overtaken", tracker.client.set_registered_model_alias, []

    def overtaken(*alias):
        if not moved:
            moved.append(alias)
            assert register(tracker, name, 1.0) == 2 and aliases(tracker, name) == {"candidate": 2, "champion": 2}
        move(*alias)

    monkeypatch.setattr(tracker.client, "set_registered_model_alias", overtaken)
    assert register(tracker, name, 2.0) == 1
    assert moved and aliases(tracker, name) == {"candidate": 2, "champion": 2}


def test_models_are_listed_with_numbers_and_aliases(tracker, capsys):
    register(tracker, "cm-listed", 2.5, run_id="0123456789abcdef")
    found = [row for row in json.loads(run(capsys, "models", "--json")[1]) if row["name"] == "cm-listed"]
    assert found[0]["aliases"] == ["candidate", "champion"] and found[0]["metrics"] == {"nfe_1/fid": 2.5}
    line = next(line for line in run(capsys, "models")[1].splitlines() if "cm-listed" in line)
    expected = ["cm-listed", "1", "candidate,", "champion", "digits", "cd", "01234567", "d", "p", "2.500"]
    assert line.split() == expected


def test_without_runs_there_are_no_models(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "params").mkdir()
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "models")[1].startswith("No models yet") and not (tmp_path / "mlflow.db").exists()
    assert run(capsys, "models", "promote", "cm-x", "1")[0] == 2


@pytest.mark.parametrize("faster", [True, False])
def test_an_alias_that_another_run_creates_first_is_looked_at_again_and_a_failure_is_raised(
    tracker, monkeypatch, faster
):
    """As when two runs end at once: the database lets one of them create the alias and refuses the other."""
    move, refused = tracker.client.set_registered_model_alias, []

    def set_alias(name, alias, version):
        if faster and refused:
            return move(name, alias, version)
        if faster:
            move(name, alias, version)
        refused.append(alias)
        raise MlflowException("UNIQUE constraint failed: registered_model_aliases")

    monkeypatch.setattr(tracker.client, "set_registered_model_alias", set_alias)
    name = f"cm-raced-{faster}"
    if faster:
        register(tracker, name, 2.0)
        assert Registry(tracker).read(name).aliases == {"candidate": 1, "champion": 1}
    else:
        with pytest.raises(MlflowException, match="UNIQUE"):
            register(tracker, name, 2.0)
    assert refused == ["candidate"]


@pytest.mark.slow
def test_runs_that_end_at_once_leave_the_best_as_champion(tmp_path, monkeypatch):
    """Eight at a time, each with a connection of its own, against one server; the best starts first, then last."""
    with mlflow_server(tmp_path) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        for name, fids in (("cm-falling", [8.0 - i for i in range(8)]), ("cm-rising", [1.0 + i for i in range(8)])):
            trackers = [Tracker(tmp_path) for _ in fids]
            models, start, errors = [log_model(tracker) for tracker in trackers], threading.Barrier(len(fids)), []

            def register_one(tracker, fid, model_id, name=name, start=start, errors=errors):
                start.wait()
                try:
                    register(tracker, name, fid, model_id=model_id)
                except Exception as error:
                    errors.append(error)

            threads = [
                threading.Thread(target=register_one, args=one) for one in zip(trackers, fids, models, strict=True)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not errors
            registered = Registry(trackers[0]).read(name)
            assert registered.champion.numbers == {"nfe_1/fid": 1.0}
            assert len(registered.versions) == 8 and registered.aliases["candidate"] == max(registered.versions)
