"""Of SeaweedFS what compose.yaml uses: `server -s3.port=... -s3.config=...`, by moto, with each user's own buckets.

Keys are looked up, signatures are not computed; objects live in memory.
"""

import json
import re
import sys
from pathlib import Path

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

given = dict(word.lstrip("-").split("=", 1) for word in sys.argv[2:] if "=" in word)
assert sys.argv[1] == "server", sys.argv
identities = json.loads(Path(given["s3.config"]).read_text())["identities"]
actions = {key["accessKey"]: one["actions"] for one in identities for key in one["credentials"]}
moto = DomainDispatcherApplication(create_backend_app)


def is_allowed(environ):
    """Whether the identity of a request may do it: Admin, or Read, Write or List on the bucket."""
    signed = environ.get("HTTP_AUTHORIZATION") or environ["QUERY_STRING"]  # an address that MLflow has signed
    found = re.search(r"Credential=([^/%]+)(/|%2F)", signed)
    may = actions.get(found[1], []) if found else []
    bucket, _, key = environ["PATH_INFO"].strip("/").partition("/")
    wanted = ("Read" if key else "List") if environ["REQUEST_METHOD"] in ("GET", "HEAD") else "Write"
    changes_bucket = wanted == "Write" and not key and "delete" not in environ["QUERY_STRING"]
    return "Admin" in may or (f"{wanted}:{bucket}" in may and not changes_bucket)


def answer(environ, start):
    if environ["PATH_INFO"] == "/healthz":
        start("200 OK", [])
        return [b""]
    if not is_allowed(environ):
        start("403 Forbidden", [("Content-Type", "application/xml")])
        return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
    return moto(environ, start)


run_simple("0.0.0.0", int(given["s3.port"]), answer, threaded=True)
