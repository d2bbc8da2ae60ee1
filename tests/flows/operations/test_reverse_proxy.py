"""`cm up --public-url` behind nginx, with the configuration of docs/operations.md."""

import os
import re
import shutil
import subprocess
import sys
from urllib.parse import urljoin

import httpx
import pytest

from live import Up, cm, environment, make_live_workspace
from miniature import REPOSITORY
from servers import Patient, client, free_port, process, wait_for_page

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
PASSWORD = "someone:{PLAIN}secret"  # an entry of nginx's file of users


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """`cm up` and nginx before it; yield the services, a browser's client and the address with the prefix."""
    if NGINX is None:
        pytest.skip("nginx is not installed: apt-get install nginx-light")
    folder, port = tmp_path_factory.mktemp("nginx"), free_port()
    root = make_live_workspace(tmp_path_factory.mktemp("up") / "workspace")
    address = f"http://ml.example:{port}/team"
    up = Up(root, "--public-url", address, "--no-workers")
    (folder / "nginx.conf").write_text(configuration(up.note, port, folder))
    folder.chmod(0o755)
    try:
        with process([NGINX, "-p", str(folder), "-c", "nginx.conf", "-g", "daemon off;"], folder) as log:
            wait_for_page(f"http://127.0.0.1:{port}/team/prefect/api/health", log)
            # As a browser whose name server knows ml.example.
            browser = client(transport=Resolved(port), follow_redirects=True, headers={"Accept": "text/html"})
            yield up, browser, address
    finally:
        assert up.stop() == 0


class Resolved(Patient):
    """Connects to the loopback, whatever the name."""

    def __init__(self, port):
        super().__init__()
        self._port = port

    def handle_request(self, request):
        assert request.url.host == "ml.example" and request.url.port == self._port, f"a link leads to {request.url}"
        url = request.url.copy_with(host="127.0.0.1")
        return super().handle_request(
            httpx.Request(request.method, url, headers=request.headers, stream=request.stream)
        )


def configuration(note, port, folder):
    """Return nginx's configuration of the docs with this machine's ports, its passwords, and without TLS."""
    (text,) = re.findall(r"```nginx\n(.*?)```", (REPOSITORY / "docs" / "operations.md").read_text(), re.S)
    for theirs, ours in {
        "listen 443 ssl": f"listen 127.0.0.1:{port}",
        "http://127.0.0.1:4200": note["prefect"],
        "http://127.0.0.1:5000": note["mlflow"],
        "/etc/nginx/mlflow-users": str(folder / "users"),
    }.items():
        assert theirs in text
        text = text.replace(theirs, ours)
    (folder / "users").write_text(PASSWORD)
    text = re.sub(r".*ssl_certificate.*\n", "", text)
    paths = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root; " if os.geteuid() == 0 else ""  # pytest's folders are closed to others
    logs = f"{user}error_log {folder}/error.log; pid {folder}/pid; events {{}}"
    return f"{logs} http {{ access_log off; {paths} {text} }}"


def scripts(page):
    """Return the addresses of the scripts and styles of a page."""
    found = re.findall(r'(?:src|href)="([^"]+\.(?:js|css))"', page.text)
    return [urljoin(str(page.url), one) for one in found]


pytestmark = pytest.mark.slow


def test_prefects_pages_and_their_parts_come_through_the_proxy(public):
    up, browser, address = public
    assert f"Prefect  {address}/prefect/v2/deployments\n" in up.welcome
    page = browser.get(f"{address}/prefect/v2/deployments")
    assert page.status_code == 200 and str(page.url).startswith(f"{address}/prefect/")
    assert scripts(page) and all(browser.get(one).status_code == 200 for one in scripts(page))
    settings = browser.get(f"{address}/prefect/ui-settings").json()
    assert settings["api_url"] == f"{address}/prefect/api"
    login = tuple(up.login.split(":"))
    api = settings["api_url"]
    assert browser.get(f"{api}/admin/version").status_code == 401, "the password is asked for as before"
    token = browser.get(f"{api}/csrf-token?client=tests", auth=login).json()["token"]
    headers = {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": "tests", "Origin": address.removesuffix("/team")}
    found = browser.post(f"{api}/deployments/filter", json={}, auth=login, headers=headers)
    assert [one["name"] for one in found.json()] == ["tiny"]


def test_mlflows_pages_and_requests_come_through_the_proxy(public):
    up, browser, address = public
    assert f"MLflow   {address}/mlflow/#/experiments/" in up.welcome
    assert browser.get(f"{address}/mlflow/").status_code == 401, "MLflow itself asks nobody"
    browser.auth = ("someone", "secret")
    page = browser.get(f"{address}/mlflow/")
    assert page.status_code == 200 and scripts(page)
    assert all(browser.get(one).status_code == 200 for one in scripts(page))
    search, origin = f"{address}/mlflow/ajax-api/2.0/mlflow/experiments/search", address.removesuffix("/team")
    found = browser.post(search, json={"max_results": 5}, headers={"Origin": origin})
    assert found.status_code == 200 and "consistency-models" in found.text
    assert browser.post(search, json={"max_results": 5}, headers={"Origin": "http://evil.example"}).status_code == 403
    evil = client().post(
        f"{up.note['mlflow']}/ajax-api/2.0/mlflow/experiments/search", headers={"Host": "evil.example"}
    )
    assert evil.status_code == 403


def test_links_of_a_run_lead_through_the_proxy(public):
    """`cm run` beside these services shows addresses that a browser elsewhere reaches."""
    up, _, address = public
    code = (
        "from pathlib import Path; from flows.operations.services import use_running; use_running(Path.cwd()); "
        "from prefect.settings import PREFECT_UI_URL; from flows.settings import Settings; "
        "print(PREFECT_UI_URL.value(), Settings.read().mlflow_url)"
    )
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, cwd=up.root, env=environment(up.root), capture_output=True, text=True, check=True)
    assert said.stdout.split() == [f"{address}/prefect", f"{address}/mlflow"]


def test_an_address_that_is_none_is_refused(tmp_path):
    ended = cm(make_live_workspace(tmp_path / "workspace"), "up", "--public-url", "ml.example/team")
    assert ended.returncode == 2 and "'ml.example/team' is not an address, https://host" in ended.stderr
