"""`cm import`: what it says, writes and refuses; `cm plan` of an imported teacher."""

import json
from pathlib import Path

import pytest

from cm_core.model import load_model
from command import run
from flows.storage.digests import file_digest
from flows.storage.locate import checksum
from miniature import save_untrained
from servers import http_server, make_certificate, s3_server

FILES = Path(__file__).parents[2] / "fixtures" / "checkpoints"


def test_a_checkpoint_becomes_a_model_that_the_other_commands_take(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = FILES / "edm_ddpmpp_cond_augment.pkl"
    code, out, _ = run(capsys, "import", path.as_uri())
    assert code == 0 and "NVlabs EDM, denoiser (EDM), song_unet, 16x16x3, 10 classes, 9 augmentation labels" in out
    assert "c_noise 1 ln(sigma) / 4" in out and "attention at 8, the middle: one head; in the file, " in out
    assert "queries, keys and values are rows (head, channel, 3)" in out
    assert "CC BY-NC-SA 4.0" in out and file_digest(path) in out and "0.2 M parameters" in out
    folder = tmp_path / "out" / "imported" / path.stem
    assert load_model(folder)[0].num_classes == 10
    assert json.loads((folder / "origin.json").read_text())["format"] == "NVlabs EDM"
    code, out, _ = run(capsys, "sample", "--model", str(folder), "--n", "2", "--steps", "2", "--out", "drawn.npy")
    assert code == 0 and "drawn.npy: 2 images" in out


def test_json_holds_the_spec_and_the_form_can_be_chosen(capsys, tmp_path):
    out = tmp_path / "ect"
    code, text, _ = run(
        capsys, "import", str(FILES / "ect_ddpmpp.pkl"), "--out", str(out), "--form", "unshifted", "--json"
    )
    facts = json.loads(text)
    assert code == 0 and facts["spec"]["form"] == "unshifted" and facts["folder"] == str(out)
    assert facts["parameters"] == 189347 and facts["attention"] == "rows (head, channel, 3)"


def test_a_folder_of_ours_is_copied(capsys, tmp_path):
    save_untrained(tmp_path / "made", form="skip", image_shape=(1, 2, 2))
    code, text, _ = run(capsys, "import", str(tmp_path / "made"), "--out", str(tmp_path / "copy"))
    assert code == 0 and "this package, consistency function skip" in text
    assert load_model(tmp_path / "copy")[0] == load_model(tmp_path / "made")[0]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return make_certificate(tmp_path_factory.mktemp("https") / "certificate.pem")


@pytest.fixture(params=["https", "s3"])
def remote(request, monkeypatch):
    """The address of a checkpoint on a server."""
    name, body = "ect_ddpmpp.pkl", (FILES / "ect_ddpmpp.pkl").read_bytes()
    if request.param == "https":
        certificate = request.getfixturevalue("certificate")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with http_server({f"/models/{name}": (200, {}, body)}, certificate) as (url, _):
            yield f"{url}/models/{name}?signature=secret"
    else:
        with s3_server(monkeypatch, "models") as client:
            client.put_object(Bucket="models", Key=f"ect/{name}", Body=body)
            yield f"s3://models/ect/{name}"


def test_a_checkpoint_on_a_server_is_imported_if_its_checksum_is_right(capsys, tmp_path, monkeypatch, remote):
    monkeypatch.chdir(tmp_path)
    path = FILES / "ect_ddpmpp.pkl"
    code, _, complaint = run(capsys, "import", remote, "--sha256", "a" * 64)
    assert code == 2 and f"sha256 is {file_digest(path)}" in complaint and complaint.count("\n") == 1
    assert not (tmp_path / "out").exists(), "nothing is written of another file"
    code, out, complaint = run(capsys, "import", remote, "--sha256", file_digest(path))
    assert code == 0 and "locuslab ECT" in out, complaint
    facts = json.loads((tmp_path / "out" / "imported" / "ect_ddpmpp" / "origin.json").read_text())
    assert facts["weights"] == remote.partition("?")[0] and facts["sha256"] == file_digest(path)
    assert run(capsys, "import", str(path), "--out", "local")[0] == 0
    weights = "ema.safetensors"
    assert file_digest(tmp_path / "local" / weights) == file_digest(tmp_path / "out/imported/ect_ddpmpp" / weights)


def test_a_folder_on_s3_is_imported_by_the_checksum_of_its_files(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_untrained(tmp_path / "made", form="skip", image_shape=(1, 2, 2))
    with s3_server(monkeypatch, "models") as client:
        for file in (tmp_path / "made").iterdir():
            client.upload_file(str(file), "models", f"mine/{file.name}")
        code, _, complaint = run(capsys, "import", "s3://models/mine/", "--sha256", "a" * 64)
        assert code == 2 and f"sha256 of its files is {checksum(tmp_path / 'made')}" in complaint
        assert run(capsys, "import", "s3://models/mine/", "--sha256", checksum(tmp_path / "made"))[0] == 0
    assert load_model(tmp_path / "out" / "imported" / "mine")[0] == load_model(tmp_path / "made")[0]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["gone.pkl"], "gone.pkl: no such file"),
        ([str(FILES / "README.md")], "README.md: neither a pickle, nor a file of torch.save, nor one of safetensors"),
        ([str(FILES)], "a folder with neither model.json (this package) nor config.json (diffusers)"),
        ([str(FILES / "ect_ddpmpp.pkl"), "--sha256", "a" * 64], "sha256 is "),
        ([str(FILES / "ect_ddpmpp.pkl"), "--form", "denoiser"], "is of form skip or unshifted, and form denoiser"),
        ([str(FILES / "ect_ddpmpp.pkl"), "--out", "/dev/null/x"], "--out /dev/null/x: cannot be written"),
    ],
)
def test_what_cannot_be_imported_is_refused_in_one_line(capsys, tmp_path, monkeypatch, arguments, reason):
    monkeypatch.chdir(tmp_path)
    code, _, complaint = run(capsys, "import", *arguments)
    assert code == 2 and reason in complaint and complaint.count("\n") == 1


def test_a_plan_knows_that_an_imported_teacher_costs_nothing(capsys):
    code, out, _ = run(capsys, "plan", "cifar10-ect-1hour", "--gpu", "h100", "--json")
    teacher, student = json.loads(out)["trainings"]
    assert code == 0 and teacher["hours"] == 0 and teacher["advice"] == "imported, not trained: costs nothing"
    assert teacher["parameters"] == student["parameters"] == 55_732_739 and student["hours"] > 0
