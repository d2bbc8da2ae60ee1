"""The server of `cm play`: what it draws is what its command writes; whom and what it refuses."""

import asyncio
import base64
import io
import os
import shlex
import weakref
from threading import Event

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from command import run
from flows.commands import drawing
from flows.commands.edit import FILLING_STEPS
from flows.play import server
from flows.play.studio import Studio
from miniature import REPOSITORY, save_untrained, unpack_registered_student
from processes import WAIT

ADDRESS = "http://127.0.0.1:8123"


@pytest.fixture
def studio(workspace, tmp_path, monkeypatch):
    monkeypatch.chdir(workspace)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "scratch").mkdir()
    studio = Studio(tmp_path / "scratch", None)
    studio.local_models()
    return studio


@pytest.fixture
def client(studio):
    return TestClient(server.make_app(studio), ADDRESS, raise_server_exceptions=False)


def file(name):
    with open(name, "rb") as opened:
        return {"name": name, "data": base64.b64encode(opened.read()).decode()}


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


STEPS = {"steps": 3, "seed": 5, "n": 3}


@pytest.mark.parametrize(
    "asked",
    [
        {"task": "sample", "steps": 1, "seed": 3, "n": 5},
        {"task": "sample", "steps": 4, "seed": 3, "n": 2, "model": "out/odd"},
        {"task": "sample", "steps": 2, "seed": 0, "n": 4, "model": "out/classes"},
        {"task": "sample", "steps": 2, "seed": 0, "n": 4, "label": 2, "model": "out/classes"},
        {"task": "sample", "steps": 2, "seed": 0, "n": 4, "guidance": 4.5, "model": "out/weights"},
        {"task": "stroke", "picture": "a.png", "label": 1, "guidance": 4.5, "model": "out/weights", **STEPS},
        {"task": "sample", "steps": 18, "seed": 1, "n": 2, "model": "out/teacher"},
        {"task": "sample", "steps": 2, "seed": 1, "n": 2, "model": "out/halved"},
        {"task": "sample", "steps": 4, "seed": 1, "n": 2, "model": "out/flow_map"},
        {"task": "inpaint", "picture": "a.png", "mask": "mask.png", **STEPS},
        {"task": "inpaint", "picture": "a.png", "mask": "mask.png", "label": 1, "model": "out/classes", **STEPS},
        {"task": "colorize", "picture": "my photo.jpg", **STEPS},
        {"task": "superres", "picture": "a.png", "factor": 2, **STEPS},
        {"task": "stroke", "picture": "my photo.jpg", "sigma": 2.5, "model": "out/grey", **STEPS},
        {"task": "denoise", "picture": "a.png", "sigma": 0.2, "steps": 1, "seed": 0},
        {"task": "interpolate", "seeds": [4, 7], "steps": 2, "n": 5},
    ],
    ids=lambda asked: "-".join(str(asked.get(key, "")) for key in ("task", "model", "label")),
)
def test_the_command_writes_the_images_of_the_page(client, tmp_path, capsys, asked):
    pictures = {name: file(asked[name]) for name in ("picture", "mask") if name in asked}
    made = client.post("/draw", json={"model": "out/student", **asked, **pictures}).json()
    word, *rest = shlex.split(made["command"])
    assert word == "cm" and made["out"] in ("out/drawn", "out/edited")
    code, _, err = run(capsys, *rest, "--out", str(tmp_path / "written"))
    assert code == 0, err
    written = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "written").iterdir())]
    assert len(written) == len(made["images"]) == asked.get("n", 1)
    for one, shown in zip(written, made["images"], strict=True):
        np.testing.assert_array_equal(pixels(shown), one)
    assert made["milliseconds"] > 0 and "network call" in made["how"]


def test_a_class_is_drawn_alone(client):
    asked = {"model": "out/classes", "task": "sample", "steps": 1, "seed": 0, "n": 3}
    every, first, last = (
        client.post("/draw", json={**asked, **label}).json()["images"] for label in ({}, {"label": 0}, {"label": 2})
    )
    assert all(a != b for a, b in zip(first, last, strict=True))
    assert sum(one in (*first, *last) for one in every) == 2, "each class once"


def test_a_weight_of_guidance_changes_what_is_drawn(client):
    asked = {"model": "out/weights", "task": "sample", "steps": 1, "seed": 3, "n": 2}
    own, same, other = (
        client.post("/draw", json=asked | told).json()["images"] for told in ({}, {"guidance": 2}, {"guidance": 8})
    )
    assert own == same and all(one != two for one, two in zip(own, other, strict=True))


def test_the_page_learns_what_a_model_can_do(client):
    names = ("student", "classes", "odd", "flow_map", "weights")
    told = {name: client.get("/model", params={"name": f"out/{name}"}).json() for name in names}
    assert told["student"]["refused"] == {} and told["student"]["steps"] == [1, 2, 4]
    assert told["student"]["factors"] == [2, 4, 8] and told["classes"]["classes"] == 3
    assert told["student"]["defaults"]["steps"]["inpaint"] == FILLING_STEPS
    assert [told["odd"][key] for key in ("channels", "height", "width")] == [1, 5, 7]
    assert told["odd"]["refused"] == {
        "colorize": "makes images of 1 channel; colorize needs a model of RGB images",
        "superres": "no whole factor divides its 7x5 pixels",
    }
    teacher = client.get("/model", params={"name": "out/teacher"}).json()
    assert teacher["steps"] == [18] and len(teacher["refused"]) == 6
    assert "is a teacher" in teacher["refused"]["inpaint"]
    assert told["weights"]["guidance"] == {"min": 1, "max": 8, "value": 2} and told["classes"]["guidance"] is None
    flow_map = told["flow_map"]
    assert flow_map["steps"] == [1, 2, 4] and len(flow_map["refused"]) == 6
    assert "is a student of MeanFlow" in flow_map["refused"]["inpaint"]


def test_models_of_the_workspace_are_offered(client, workspace, monkeypatch):
    assert client.get("/models").json()["models"]["out/student"] == "student of this workspace"
    assert len(client.get("/models").json()["models"]) == 8
    assert client.get("/registered").json() == {"models": {}}
    monkeypatch.chdir(workspace / "params")
    assert "../out/student" in Studio(workspace, None).local_models()


def test_a_model_in_a_folder_is_enough(workspace, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert list(Studio(tmp_path, str(workspace / "out" / "grey")).local_models()) == [str(workspace / "out" / "grey")]
    code, _, err = run(capsys, "play")
    assert code == 2 and "not inside a workspace" in err and err.count("\n") == 1


def test_registered_models_are_offered_and_drawn_with(tmp_path, monkeypatch):
    unpack_registered_student(tmp_path / "root")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path / "root")
    client = TestClient(server.make_app(Studio(tmp_path)), ADDRESS)
    assert client.get("/models").json()["models"] == {}
    ((name, text),) = client.get("/registered").json()["models"].items()
    assert (name, text) == ("models:/cm-digits/1", "cm-digits 1: candidate, champion")
    command = {"model": name, "task": "sample", "steps": 2, "seed": 5, "n": 1, "label": 0}
    drawn = np.load(REPOSITORY / "tests" / "fixtures" / "logged_before_wings" / "drawn.npy")
    np.testing.assert_array_equal(pixels(client.post("/draw", json=command).json()["images"][0]), drawn[0].squeeze())


def test_a_picture_is_shown_as_the_model_sees_it(client):
    seen = client.post("/picture", json={"model": "out/grey", "task": "stroke", "picture": file("my photo.jpg")}).json()
    assert pixels(seen["image"]).shape == (8, 8)
    assert seen["notes"] == [
        "my photo.jpg: center-crop from 60x40 to 8x8, its colours dropped, for the model makes grey images"
    ]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"model": "out/nowhere"}, ["out/nowhere", "reload"]),
        ({"model": "/etc"}, ["/etc", "reload"]),
        ({"task": "gc"}, ["task", "sample"]),
        ({"steps": 0}, ["steps", "1"]),
        ({"n": 100000}, ["n:", "64"]),
        ({"label": 1}, ["--label 1", "knows no classes"]),
        ({"model": "out/classes", "label": 3}, ["--label 3", "3 classes"]),
        ({"out": "/tmp"}, ["out", "not permitted"]),
        ({"task": "stroke", "picture": {"name": "../a.png", "data": ""}}, ["picture.name", "plain name"]),
        ({"task": "stroke", "picture": {"name": "a.png", "data": "AAAA"}}, ["a.png: not an image", "PNG, JPEG"]),
        ({"task": "stroke", "picture": {"name": "-h", "data": "AAAA"}}, ["-h: not an image"]),
        ({"task": "stroke", "picture": "a.png", "sigma": 90}, ["--sigma 90", "80"]),
        ({"task": "stroke"}, ["IMAGE"]),
        ({"task": "inpaint", "picture": "a.png"}, ["--mask"]),
        ({"task": "inpaint", "picture": "a.png", "mask": "a.png"}, ["a.png", "names"]),
        ({"task": "superres", "picture": "a.png", "factor": 3}, ["--factor 3", "8x8"]),
        ({"task": "colorize", "picture": "a.png", "model": "out/grey"}, ["out/grey", "RGB"]),
        ({"task": "stroke", "picture": "a.png", "model": "out/teacher"}, ["out/teacher", "teacher"]),
        ({"task": "stroke", "picture": "my photo.jpg", "model": "out/odd"}, ["my photo.jpg", "60x40", "7x5"]),
    ],
)
def test_what_makes_no_sense_is_one_line(client, studio, asked, words):
    body = {"model": "out/student", "task": "sample", "steps": 1, "seed": 0, **asked}
    body |= {name: file(body[name]) for name in ("picture", "mask") if isinstance(body.get(name), str)}
    answer = client.post("/draw", json=body)
    reason = answer.json()["error"]
    assert answer.status_code == 400 and "\n" not in reason
    assert all(word in reason for word in words), reason
    assert "cm-play" not in reason and "scratch" not in reason, "the page knows no paths of this machine"
    assert not list(studio._scratch.iterdir())


def test_a_decompression_bomb_is_refused(client):
    buffer = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(buffer, format="PNG")
    bomb = {"name": "bomb.png", "data": base64.b64encode(buffer.getvalue()).decode()}
    answer = client.post("/draw", json={"model": "out/student", "task": "stroke", "picture": bomb})
    assert answer.status_code == 400 and answer.json()["error"].startswith("bomb.png: ")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": "out/student"}'])
def test_a_body_that_is_no_command_is_one_line(client, body):
    answer = client.post("/draw", content=body)
    assert answer.status_code == 400 and "\n" not in answer.json()["error"]


def test_uploads_are_limited(client, monkeypatch):
    monkeypatch.setattr(server, "MAX_BYTES", 3 << 20)
    answer = client.post("/draw", content=b" " * (3 << 20) + b"{}")
    assert (answer.status_code, answer.json()) == (413, {"error": "a request may have 3 MiB, pictures included"})


ROUTES = [
    ("GET", "/"),
    ("GET", "/play.js"),
    ("GET", "/models"),
    ("GET", "/registered"),
    ("GET", "/model?name=out/grey"),
]
ROUTES += [("POST", "/draw"), ("POST", "/picture"), ("GET", "/nowhere")]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:8123"},
        {"Host": "[::ffff:1.2.3.4]:8123"},
        {"Origin": "https://evil.example"},
        {"Origin": "http://localhost:3000"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
    ids=lambda headers: "=".join(*headers.items()),
)
def test_another_website_gets_nothing(client, studio, monkeypatch, method, path, headers):
    called = []
    for name in ("local_models", "registered_models", "describe", "read", "draw"):
        monkeypatch.setattr(studio, name, lambda *_: called.append(1))
    body = {"model": "out/student", "task": "sample", "steps": 1, "seed": 0}
    answer = client.request(method, path, headers=headers, **({"json": body} if method == "POST" else {}))
    assert answer.status_code == 403 and list(answer.json()) == ["error"]
    assert not called
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_nothing_of_the_page_may_be_framed_or_run_elsewhere(client, method, path):
    headers = client.request(method, path, headers={"Origin": ADDRESS, "Sec-Fetch-Site": "same-origin"}).headers
    assert (
        "default-src 'self'" in headers["content-security-policy"]
        and "unsafe" not in headers["content-security-policy"]
    )
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["cross-origin-resource-policy"] == "same-origin" and headers["x-content-type-options"] == "nosniff"


def test_the_port_may_be_forwarded_from_another_machine(client):
    headers = {"Host": "localhost:9000", "Origin": "http://localhost:9000"}
    assert client.get("/models", headers=headers).status_code == 200


def test_a_fault_of_ours_shows_no_traceback(client, studio, monkeypatch, capsys):
    def break_down(_):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(studio, "draw", break_down)
    answer = client.post("/draw", json={"model": "out/student", "task": "sample", "steps": 1, "seed": 0})
    assert answer.status_code == 500
    assert answer.json() == {"error": "ZeroDivisionError; the terminal of cm play has the details"}
    assert "default-src" in answer.headers["content-security-policy"]
    assert 'raise ZeroDivisionError("secret")' in capsys.readouterr().err


def test_the_page_answers_while_something_is_drawn(studio, monkeypatch):
    drawing, may_end = Event(), Event()
    load = studio._load

    def slow_load(model):
        drawing.set()
        assert may_end.wait(WAIT)
        return load(model)

    monkeypatch.setattr(studio, "_load", slow_load)

    async def ask():
        transport = httpx.ASGITransport(server.make_app(studio))
        async with httpx.AsyncClient(transport=transport, base_url=ADDRESS, timeout=WAIT) as client:
            body = {"model": "out/student", "task": "sample", "steps": 1, "seed": 0}
            drawn = [asyncio.create_task(client.post("/draw", json=body)) for _ in range(2)]
            assert await asyncio.to_thread(drawing.wait, WAIT)
            for path in ("/", "/models"):
                assert (await client.get(path)).status_code == 200
            assert not any(one.done() for one in drawn)
            may_end.set()
            first, second = await asyncio.gather(*drawn)
            assert first.json()["images"] == second.json()["images"]

    asyncio.run(ask())
    assert not studio._drawing.locked()


def test_one_model_is_in_memory_and_a_trained_one_is_read_anew(studio, tmp_path, monkeypatch):
    folder = tmp_path / "trained"
    save_untrained(folder, form="skip", image_shape=(1, 4, 4))
    studio._offered.add(str(folder))
    first = weakref.ref(studio._load(str(folder))[1])
    assert studio._load(str(folder))[1] is first()
    left = []

    def load(model):
        left.append(first())
        return drawing.load(model)

    monkeypatch.setattr("flows.play.studio.load", load)
    studio._load("out/grey")
    assert left == [None], "two may not fit"
    kept = studio._load(str(folder))[1]
    later = max(path.stat().st_mtime_ns for path in folder.iterdir()) + 1
    os.utime(folder / "model.json", ns=(later, later))
    assert studio._load(str(folder))[1] is not kept


def test_a_model_that_is_none_is_refused_before_the_page_is_served(workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    code, out, err = run(capsys, "play", "nowhere")
    assert (code, out) == (2, "") and err.startswith("cm: nowhere: holds no model.json") and err.count("\n") == 1


def test_a_port_that_is_taken_is_refused_in_one_line(workspace, monkeypatch, capsys):
    from flows.play.command import listen

    monkeypatch.chdir(workspace)
    with listen(0) as taken:
        assert taken.getsockname()[0] == "127.0.0.1"
        number = taken.getsockname()[1]
        code, _, err = run(capsys, "play", "--port", str(number))
    assert code == 2 and err.startswith(f"cm: --port {number}: ") and err.count("\n") == 1
