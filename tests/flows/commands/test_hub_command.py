"""`cm export --to hub`: the folder, its card, and what is uploaded, to a server in place of the Hub's."""

import hashlib
import json
import sys
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from PIL import Image

from cm_core.formats.read import read_checkpoint
from cm_core.metrics.torchvision_shim import ensure_torchvision
from cm_core.model import load_model
from command import run
from miniature import save_adm, save_untrained

hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
TOKEN = "hf_made-up"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """A folder outside any workspace, and no token of the user's."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))


@contextmanager
def server_of_the_hub(monkeypatch, *, refuses=False):
    """Serve the part of the Hub's API that an upload needs; yield the calls and the files by path."""
    calls, files, stored = [], {}, {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            calls.append((self.path, self.headers.get("Authorization")))
            if refuses:
                self.answer({"error": "You don't have the rights"}, 403)
            elif self.path == "/api/repos/create":
                calls[-1] += (json.loads(body),)
                self.answer({"url": f"{url}/me/digits", "name": "me/digits", "id": "1"})
            elif self.path == "/api/validate-yaml":
                self.answer({"warnings": [], "errors": []})
            elif self.path.endswith("/preupload/main"):
                names = [file["path"] for file in json.loads(body)["files"]]
                mode = {True: "lfs", False: "regular"}
                asked = [{"path": name, "uploadMode": mode[name.endswith(".safetensors")]} for name in names]
                self.answer({"files": [{**one, "shouldIgnore": False} for one in asked]})
            elif self.path.endswith("/info/lfs/objects/batch"):
                (file,) = json.loads(body)["objects"]
                actions = {"upload": {"href": f"{url}/stored/{file['oid']}"}}
                self.answer({"transfer": "basic", "objects": [{**file, "actions": actions}]})
            elif self.path.endswith("/commit/main"):
                for line in map(json.loads, body.splitlines()):
                    files[line["value"].get("path")] = line["value"]
                page = f"{url}/me/digits/commit/1"
                self.answer({"success": True, "commitOid": "1" * 40, "commitUrl": page, "hookOutput": ""})

        def do_PUT(self):
            stored[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
            self.answer({})

        def do_GET(self):
            self.answer({"error": "no such file"}, 404)

        def answer(self, content, code=200):
            body = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # this server has the older protocol alone
    try:
        yield calls, files, stored
    finally:
        server.shutdown()
        server.server_close()


def front_matter(folder):
    return hub.ModelCard((folder / "README.md").read_text()).data


def test_a_folder_of_the_hub_holds_card_picture_and_weights(capsys, tmp_path):
    model, out = save_adm(tmp_path / "model", "skip"), tmp_path / "hub"
    code, told, _ = run(capsys, "export", model, "--to", "hub", "--out", str(out), "--licence", "apache-2.0")
    assert code == 0 and "MLflow knows no measurement of these weights" in told
    card = front_matter(out)
    assert (card.license, card.library_name) == ("apache-2.0", "diffusers") and "consistency-models" in card.tags
    text = (out / "README.md").read_text()
    assert "10 classes" in text and "Not measured." in text and "![Samples](samples.png)" in text
    assert 'DiffusionPipeline.from_pretrained("OWNER/NAME")\nimage = pipeline(class_labels=0).images[0]' in text
    assert "cm import https://huggingface.co/OWNER/NAME/resolve/main/model.safetensors" in text
    assert Image.open(out / "samples.png").size[0] > 16 * 4
    first, again = load_model(Path(model))[1].state_dict(), read_checkpoint(out / "model.safetensors").weights
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.slow
def test_diffusers_reads_the_folder_of_the_hub(capsys, tmp_path):
    ensure_torchvision()
    diffusers = pytest.importorskip("diffusers")
    model, out = save_adm(tmp_path / "model", "skip"), tmp_path / "hub"
    assert run(capsys, "export", model, "--to", "hub", "--out", str(out))[0] == 0
    assert type(diffusers.DiffusionPipeline.from_pretrained(out)).__name__ == "ConsistencyModelPipeline"


def test_a_model_that_diffusers_lacks_says_so(capsys, tmp_path):
    save_untrained(tmp_path / "model", form="unshifted", image_shape=(1, 2, 2))
    (tmp_path / "model" / "origin.json").write_text('{"method": "ect", "init_from": "teacher", "seed": 1}')
    code, _, _ = run(capsys, "export", str(tmp_path / "model"), "--to", "hub", "--out", str(tmp_path / "hub"))
    card = front_matter(tmp_path / "hub")
    assert code == 0 and (card.license, card.library_name) == ("unknown", "consistency-pipeline")
    text = (tmp_path / "hub" / "README.md").read_text()
    assert "diffusers has no such model." in text and "None is stated for these weights." in text
    assert ", trained by ect." in text and "ect" in card.tags
    assert "Nothing was trained here." not in text
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == [
        "README.md",
        "model.safetensors",
        "samples.png",
    ]


def test_the_licence_of_an_imported_model_is_kept(capsys, tmp_path):
    fixture = Path(__file__).parents[2] / "fixtures" / "checkpoints" / "ect_ddpmpp.pkl"
    assert run(capsys, "import", str(fixture), "--out", "model")[0] == 0
    assert run(capsys, "export", "model", "--to", "hub")[0] == 0
    text = (tmp_path / "out" / "hub" / "README.md").read_text()
    assert "locuslab ECT" in text and "CC BY-NC-SA 4.0" in text


def test_the_folder_is_uploaded_when_asked_with_the_users_token(capsys, tmp_path, monkeypatch):
    save_untrained(tmp_path / "model", form="skip", image_shape=(1, 2, 2))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with server_of_the_hub(monkeypatch) as (calls, files, stored):
        code, told, complaint = run(capsys, "export", "model", "--to", "hub", "--push", "me/digits")
        assert code == 0, complaint
        assert "/me/digits" in told
    created = next(call[2] for call in calls if call[0] == "/api/repos/create")
    assert created["visibility"] == "private" and {call[1] for call in calls} == {f"Bearer {TOKEN}"}
    written = {path.name: path.read_bytes() for path in (tmp_path / "out" / "hub").iterdir()}
    assert files.keys() >= written.keys() == {"README.md", "model.safetensors", "samples.png"}
    sha256 = hashlib.sha256(written["model.safetensors"]).hexdigest()
    assert stored == {sha256: written["model.safetensors"]} and files["model.safetensors"]["oid"] == sha256
    assert "https://huggingface.co/me/digits/resolve/main/model.safetensors" in written["README.md"].decode()
    assert TOKEN not in written["README.md"].decode()


def test_nothing_is_written_before_an_upload_that_cannot_be(capsys, tmp_path, monkeypatch):
    save_untrained(tmp_path / "model", form="skip", image_shape=(1, 2, 2))
    export = ("export", "model", "--to", "hub", "--push")
    for repository, reason in (("me/digits", "no token of the Hub; set HF_TOKEN"), ("digits", "expected OWNER/NAME")):
        if repository == "digits":
            monkeypatch.setenv("HF_TOKEN", TOKEN)
        code, _, complaint = run(capsys, *export, repository)
        assert code == 2 and reason in complaint and complaint.count("\n") == 1
    for repository in ("me/two/digits", "me/a b"):
        code, _, complaint = run(capsys, *export, repository)
        assert code == 2 and f"--push {repository}: " in complaint and complaint.count("\n") == 1
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    code, _, complaint = run(capsys, *export, "me/digits")
    assert code == 2 and "pip install huggingface_hub" in complaint and not (tmp_path / "out").exists()


def test_an_upload_that_is_refused_is_told_in_one_line(capsys, tmp_path, monkeypatch):
    save_untrained(tmp_path / "model", form="skip", image_shape=(1, 2, 2))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with server_of_the_hub(monkeypatch, refuses=True):
        code, _, complaint = run(capsys, "export", "model", "--to", "hub", "--push", "me/digits")
        assert code == 2 and "--push me/digits: " in complaint and "403" in complaint and complaint.count("\n") == 1
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert TOKEN not in complaint
    code, _, complaint = run(capsys, "export", "model", "--to", "hub", "--out", "two", "--push", "me/digits")
    assert code == 2 and "Connection refused; two is written" in complaint and complaint.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--to", "onnx", "--push", "me/digits"], "--push and --licence are for --to hub, not --to onnx"),
        (["--to", "hub", "--out", "model/model.json"], "--out model/model.json: cannot be written (File exists)"),
        (["--to", "hub", "--out", "full"], "--out full: is not empty, and all in it would be uploaded"),
    ],
)
def test_options_that_do_not_fit_are_refused(capsys, tmp_path, arguments, reason):
    save_untrained(tmp_path / "model", form="skip", image_shape=(1, 2, 2))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "secret.txt").write_text("")
    code, _, complaint = run(capsys, "export", "model", *arguments)
    assert code == 2 and reason in complaint and complaint.count("\n") == 1
