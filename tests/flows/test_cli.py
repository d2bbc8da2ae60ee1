"""The command `cm`: what it prints, how it ends, and that it starts without the heavy libraries."""

import json
import logging
import subprocess
import sys

import pytest

from command import run
from flows.commands import doctor, why
from flows.errors import StageFailed
from miniature import REPOSITORY, make_workspace

RECIPE = """# A page for tests: eight by eight, seconds.
# Second line.
teacher: null
student: {method: {kind: ct}, train: {num_steps: 2}}
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A workspace with recipes, in which the commands run."""
    (tmp_path / "params" / "recipes").mkdir(parents=True)
    (tmp_path / "params" / "recipes" / "tiny.yaml").write_text(RECIPE)
    (tmp_path / "params" / "recipes" / "bare.yaml").write_text("seed: 3\n")
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """A miniature workspace, brought up to date once."""
    root = make_workspace(tmp_path_factory.mktemp("computed"))
    subprocess.run([sys.executable, "-m", "dvc", "repro", "--quiet"], cwd=root, check=True)
    return root


@pytest.mark.parametrize("argv", [("recipes",), ("recipes", "--json"), ("--help",), ("run", "--help")])
def test_light_commands_import_nothing_heavy(argv, root):
    code = (
        f"import sys, contextlib\nfrom flows.cli import main\n"
        f"with contextlib.suppress(SystemExit): main({argv!r})\n"
        "print([name for name in ('torch', 'numpy', 'pydantic', 'mlflow', 'prefect', 'dvc', 'yaml', 'rich')"
        " if name in sys.modules], file=sys.stderr)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, env={"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True)
    assert done.stdout and done.stderr == "[]\n"


def test_no_recipe_needs_the_compiler_to_be_checked():
    """PyTorch imports it, a second's work, for arithmetic on the device on which networks are built for a check."""
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from flows.recipes.recipe import load_recipe, recipe_names\nroot = Path.cwd()\n"
        "print(len([load_recipe(name, root=root) for name in recipe_names(root)]), 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    count, imported = done.stdout.split()
    assert int(count) > 10 and imported == "False"


def test_recipes_are_listed_with_the_first_line_of_their_page(root, capsys):
    assert run(capsys, "recipes") == (0, "bare\ntiny  A page for tests: eight by eight, seconds.\n", "")
    found = json.loads(run(capsys, "recipes", "--json")[1])
    assert found[0] == {"name": "bare", "summary": ""} and found[1]["name"] == "tiny"


def test_show_says_where_each_value_comes_from(root, capsys):
    code, out, _ = run(capsys, "show", "tiny", "--set", "seed=7", "--set", "student.method.distance=l1", "--json")
    sources = {entry["key"]: (entry["value"], entry["source"]) for entry in json.loads(out)}
    assert code == 0
    assert sources["seed"] == (7, "--set")
    assert sources["student.method.distance.kind"] == ("l1", "--set")
    assert sources["student.train.num_steps"] == (2, str(root / "params/recipes/tiny.yaml"))
    assert sources["noise.sigma_max"] == (80.0, "default")
    table = run(capsys, "show", "tiny", "--set", "seed=7")[1]
    assert any(line.split() == ["seed", "7", "--set"] for line in table.splitlines())


def test_use_writes_the_resolved_recipe(root, capsys):
    code, out, _ = run(capsys, "use", "tiny", "--set", "seed=7")
    text = (root / "params/active.yaml").read_text()
    assert code == 0 and str(root / "params/active.yaml") in out
    assert "seed: 7" in text and "sigma_max: 80.0" in text


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (("show", "nope"), ["'nope'", "bare, tiny"]),
        (("run", "nope"), ["'nope'", "bare, tiny"]),
        (("use", "tiny", "--set", "seed"), ["--set seed", "key=value"]),
        (("show", "tiny", "--set", "sede=1"), ["sede", "did you mean seed"]),
        (("run", "tiny", "--set", "student.method.kind=cb"), ["student.method.kind", "cb", "cd"]),
        (("run", "tiny", "--set", "seed=many"), ["seed", "many", "integer"]),
        (("use", "tiny", "--set", "student.method=cd"), ["teacher is null"]),
        (("show", "tiny", "--set", "noise.sigma_min=90"), ["sigma_min=90", "sigma_max"]),
        (("show", "tiny", "--set", "student.method.distance=lpips"), ["lpips"]),
        (("stage", "teacher"), [f"the code of {REPOSITORY}", "PYTHONPATH"]),
        (("why", "bake"), ["no stage 'bake'"]),
        (("why",), ["params/active.yaml", "cm use"]),
        (("sample", "--model", "nowhere"), ["nowhere", "model.json"]),
        (("sample", "--n", "0"), ["--n", "whole number above 0"]),
        (("evaluate", "images"), ["out/prepare/dataset.json", "stage prepare"]),
        (("bake",), ["bake", "recipes"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(argv, names, root, capsys):
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert err.startswith("cm: ") and err.count("\n") == 1
    assert all(name in err for name in names), err
    assert not (root / "params" / "active.yaml").exists()


def test_what_is_almost_a_command_or_a_recipe_is_guessed(root, capsys):
    for argv, guess in (
        (("rnu",), "invalid choice: 'rnu' (did you mean run"),
        (("show", "tinny"), "no recipe 'tinny' (did you mean tiny?)"),
        (("runs", "--sum", "recip"), "did you mean recipe?"),
        (("runs", "--sum", "xyz"), "choose from recipe, user, method, status"),
    ):
        code, _, err = run(capsys, *argv)
        assert code == 2 and guess in err and err.count("\n") == 1


def test_cm_alone_lists_every_command_once_by_groups(root, capsys):
    code, out, _ = run(capsys)
    groups = [line for line in out.splitlines() if line.endswith(":") and line[0] != " "]
    assert code == 0 and groups[0] == "options:" and "Train:" in groups and len(groups) == 7
    named = [line.split()[0] for line in out.partition("Train:")[2].splitlines() if line.startswith("  ")]
    assert len(named) == len(set(named)) > 25 and {"run", "runs", "up", "gc", "alerts", "play"} <= set(named)


def test_plan_sums_hours_and_their_price(capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.delenv("CM_DEVICES", raising=False)
    found = json.loads(run(capsys, "plan", "cifar10-quick", "--gpu", "a100", "--price", "2", "--json")[1])
    hours = sum(row["hours"] for row in found["trainings"])
    assert len(found["trainings"]) == 2 and hours > 0
    assert found["total"] == {"hours": hours, "gpu_hours": hours, "cost": 2 * hours}
    monkeypatch.setenv("CM_DEVICES", "2")
    text = run(capsys, "plan", "cifar10-quick", "--gpu", "a100", "--price", "2")[1]
    assert f"{hours:,.1f} GPU-hours; at 2 an hour of one GPU: {2 * hours:,.2f}" in text
    assert "cost" not in run(capsys, "plan", "cifar10-quick", "--gpu", "a100")[1]
    code, _, err = run(capsys, "plan", "cifar10-quick", "--price", "-1")
    assert code == 2 and "not a price" in err


def test_a_narrow_terminal_gets_fewer_columns_and_is_told(monkeypatch, capsys):
    from flows.commands.output import print_table

    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    columns, rows = ("id", "user", "status", "FID"), [("a" * 20, "b" * 20, "failed", "1.0")]
    for width, shown in ((80, True), (40, False)):
        monkeypatch.setenv("COLUMNS", str(width))
        print_table(columns, rows, numbers=1, optional=("user",))
        out = capsys.readouterr().out
        assert ("b" * 20 in out) is shown and "failed" in out and ("too narrow for user" in out) is not shown


def test_texts_of_others_write_nothing_into_the_terminal(capsys):
    """Names of runs and users are anybody's who may write to MLflow; messages quote what servers answer."""
    from flows.commands.output import log_to_terminal, print_table

    hostile = "evil\x1b[2J\x1b]0;title\x07\nforged"
    print_table(("id", "user"), [(hostile, "b")])
    log_to_terminal()
    logging.getLogger("flows.hostile").warning("no answer: %s", hostile)
    shown = capsys.readouterr()
    assert "evil\\x1b[2J\\x1b]0;title\\x07\\nforged" in shown.out and "evil\\x1b[2J" in shown.err
    assert not {"\x1b", "\x07"} & set(shown.out + shown.err)


def test_outside_of_a_workspace_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "recipes")
    assert code == 2 and err == f"cm: {tmp_path}: not inside a workspace (no folder above holds dvc.yaml and params/)\n"


def test_ctrl_c_and_a_closed_pipe_have_their_own_exit_codes(root, monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("flows.commands.recipes.recipes", interrupted)
    assert run(capsys, "recipes") == (130, "", "cm: stopped\n")
    shell = f"{sys.executable} -m flows.cli recipes | : ; exit ${{PIPESTATUS[0]}}"
    monkeypatch.undo()
    done = subprocess.run(["bash", "-c", shell], cwd=root, env={"PYTHONPATH": str(REPOSITORY)}, capture_output=True)
    assert done.returncode == 141 and done.stderr == b""


def test_a_failed_run_exits_with_1_and_says_where_it_lies(root, monkeypatch, capsys):
    def fails(*_, **__):
        raise StageFailed("student failed:\nloss is nan at step 7")

    monkeypatch.setattr("flows.commands.run.run_pipeline", fails)
    code, _, err = run(capsys, "run", "tiny")
    assert code == 1 and "loss is nan at step 7" in err and str(root / ".cm" / "runs") in err


def test_why_says_that_nothing_changed(computed, monkeypatch, capsys):
    monkeypatch.chdir(computed)
    assert run(capsys, "why") == (0, "Every stage is up to date with params/active.yaml, code and inputs.\n", "")
    assert run(capsys, "why", "--json") == (0, "{}\n", "")


def test_why_names_params_code_and_outputs_in_plain_words(computed, monkeypatch, capsys):
    monkeypatch.chdir(computed)
    active, dvc_yaml = computed / "params/active.yaml", computed / "dvc.yaml"
    before = active.read_text(), dvc_yaml.read_text()
    try:
        active.write_text(before[0].replace("1.0e-05", "2.0e-05").replace("false", "true"))
        dvc_yaml.write_text(before[1].replace("teacher out/prepare\n", "teacher out/prepare --fast\n"))
        out = run(capsys, "why")[1].splitlines()
        assert out == [
            "features runs again because",
            "  features.learning_rate: 1e-05 -> 2e-05",
            "teacher runs again because",
            "  command changed",
            "evaluate runs again if features or teacher makes something new",
        ]
        assert run(capsys, "why", "prepare")[1].startswith("prepare is up to date")
        found = json.loads(run(capsys, "why", "evaluate", "--json")[1])
        assert found == {"evaluate": {"reasons": [], "follows": ["features", "teacher"]}}
    finally:
        active.write_text(before[0])
        dvc_yaml.write_text(before[1])


def test_why_knows_a_stage_that_never_ran(computed, tmp_path):
    root = make_workspace(tmp_path)
    assert why.explain(root)["prepare"] == {"reasons": ["it has never run here"], "follows": []}


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, ["x.a.c: 2 -> 3"]),
        ({"kind": "cd", "solver": "heun"}, {"kind": "ct", "s0": 2}, ["x.kind: cd -> ct"]),
        ({"a": None}, {"a": {"kind": "edm", "b": 1}}, ["x.a: null -> edm"]),
        ({"a": True}, {}, ["x.a: true -> (not given)"]),
        ({"a": [1, 2]}, {"a": [1, 2]}, []),
    ],
)
def test_differences_go_down_to_the_value_that_changed(before, after, said):
    assert list(why.differences(before, after, "x")) == said


def test_doctor_finds_a_sound_workspace(computed, monkeypatch, capsys):
    monkeypatch.chdir(computed)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    code, out, _ = run(capsys, "doctor", "--json")
    found = json.loads(out)
    assert code == 0 and found["ok"], out
    assert {check["name"] for check in found["checks"]} == {*doctor.MACHINE, *doctor.WORKSPACE}
    cache = computed / ".dvc" / "cache" / "files" / "md5"
    assert not list(cache.glob("cm-doctor*")) and not list((computed / ".cm/remote").rglob("cm-doctor*"))


def test_doctor_names_what_is_broken_and_exits_with_1(tmp_path, monkeypatch, capsys):
    root = make_workspace(tmp_path / "workspace")
    (root / ".cm").mkdir()
    (root / ".cm" / "remote").write_text("a file where the remote's folder should be")
    monkeypatch.chdir(root)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    code, out, _ = run(capsys, "doctor")
    broken = [line for line in out.splitlines() if "BROKEN" in line]
    assert code == 1 and len(broken) == 2
    assert "http://127.0.0.1:9/api" in broken[0] and "prefect server start" in broken[0]
    assert "DVC remote" in broken[1]


def test_doctor_repeats_no_password(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(make_workspace(tmp_path / "workspace"))
    monkeypatch.setenv("PREFECT_API_URL", "http://cm:hunter2@127.0.0.1:9/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://cm:hunter2@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # other tests here have set more
    _, out, err = run(capsys, "doctor")
    assert "http://127.0.0.1:9" in out and "hunter2" not in out + err


def test_doctor_knows_a_gpu_that_pytorch_cannot_use(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # without nvidia-smi its word is taken
    found = doctor._examine("torch", doctor._torch)
    assert found["ok"] is False and found["says"].startswith("GPU 3: PyTorch ") and "cannot use it" in found["says"]


def test_doctor_outside_of_a_workspace_examines_the_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "doctor", "--json")
    checks = json.loads(out)["checks"]
    assert code == 1 and [check["name"] for check in checks] == list(doctor.MACHINE)
    assert [check["name"] for check in checks if not check["ok"]] == ["workspace"]


def test_doctor_knows_a_package_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: ["fastapi>=0.1,<0.2", 'nosuch; extra == "dev"'])
    assert "fastapi" in doctor._examine("packages", doctor._packages)["says"]
