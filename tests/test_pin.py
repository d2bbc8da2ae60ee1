"""infra/pin.py against a registry: a stand-in that speaks the distribution protocol, with a token for anybody."""

import hashlib
import json
import shutil
import sys
import urllib.error

import pytest

from miniature import REPOSITORY
from servers import http_server

sys.path.insert(0, str(REPOSITORY / "infra"))
import pin

TAGS = {"library/python": b'{"python": 1}', "library/postgres": b'{"postgres": 1}', "chrislusf/seaweedfs": b"{}"}


@pytest.fixture
def infra(tmp_path):
    shutil.copytree(REPOSITORY / "infra", tmp_path / "infra", ignore=shutil.ignore_patterns("secrets", "__pycache__"))
    return tmp_path / "infra"


@pytest.fixture
def registry(monkeypatch):
    """A registry in place of Docker's; yield its address and the answers, which may be changed."""
    answers = {}
    with http_server(answers) as (url, _):
        host = url.removeprefix("http://")
        monkeypatch.setattr(pin, "HUB", host)
        for name, body in TAGS.items():
            for tag in ("3.11.13-slim-bookworm", "17.5-bookworm", "4.44"):
                answers[f"/v2/{name}/manifests/{tag}"] = (200, {}, body)
        answers["/v2/team/consistency-pipeline/manifests/7"] = (200, {}, b'{"ours": 7}')
        yield host, answers


def sha(body):
    return f"@sha256:{hashlib.sha256(body).hexdigest()}"


def images(folder):
    return {path.relative_to(folder): path.read_text() for pattern in pin.FILES for path in folder.glob(pattern)}


def test_images_of_others_are_pinned_and_followed(infra, registry):
    before = images(infra)
    assert len(pin.pin(infra, None)) == 3
    once = images(infra)
    assert f"FROM python:3.11.13-slim-bookworm{sha(TAGS['library/python'])}\n" in (infra / "Dockerfile").read_text()
    compose = (infra / "compose.yaml").read_text()
    assert f" image: postgres:17.5-bookworm{sha(TAGS['library/postgres'])}\n" in compose
    assert f" image: chrislusf/seaweedfs:4.44{sha(TAGS['chrislusf/seaweedfs'])}\n" in compose
    assert {str(path) for path in before if before[path] != once[path]} == {"Dockerfile", "compose.yaml"}
    pin.pin(infra, None)
    assert images(infra) == once, "a second time changes nothing"
    host, answers = registry
    answers["/v2/library/postgres/manifests/17.5-bookworm"] = (200, {}, b"rebuilt")
    pin.pin(infra, None)
    assert f"postgres:17.5-bookworm{sha(b'rebuilt')}\n" in (infra / "compose.yaml").read_text()


def test_our_image_is_named_everywhere_as_it_was_pushed(infra, registry):
    image = f"{registry[0]}/team/consistency-pipeline:7"
    for _ in range(2):
        pin.pin(infra, image)
        found = [one for text in images(infra).values() for one in pin.OURS.findall(text)]
        assert len(found) >= 8 and set(found) == {image + sha(b'{"ours": 7}')}
    assert (
        json.loads((infra / "work-pools" / "kubernetes.json").read_text())["variables"]["properties"]["image"][
            "default"
        ]
        == found[0]
    )


def test_a_registry_that_wants_a_token_gives_it_to_anybody(registry, monkeypatch):
    host, answers = registry
    challenge = f'Bearer realm="http://{host}/token",service="registry",scope="repository:library/postgres:pull"'
    path = "/v2/library/postgres/manifests/17.5-bookworm"
    manifest, read = answers[path], pin._read
    answers["/token"] = (200, {}, b'{"token": "for anybody"}')
    answers[path] = (401, {"WWW-Authenticate": challenge}, b"")

    def with_token(url, headers):
        if url.endswith(path) and headers.get("Authorization") == "Bearer for anybody":
            return manifest[2]
        return read(url, headers)

    monkeypatch.setattr(pin, "_read", with_token)
    assert f"@{pin.digest_of('postgres:17.5-bookworm')}" == sha(TAGS["library/postgres"])


def test_nothing_is_written_unless_every_digest_is_known(infra, registry):
    del registry[1]["/v2/chrislusf/seaweedfs/manifests/4.44"]
    before = images(infra)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        pin.pin(infra, None)
    assert images(infra) == before
