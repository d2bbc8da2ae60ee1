"""Pin the images that infra/ names by digest: NAME:TAG becomes NAME:TAG@sha256:..., as their registries have it now.

    python infra/pin.py                                                   those of others: base, database, object store
    python infra/pin.py --image registry.example/consistency-pipeline:1   and ours, as you have pushed it, everywhere

An image that is pinned already gets its tag's present digest. A registry on the loopback is asked by HTTP.
"""

import argparse
import hashlib
import json
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlencode

INFRA = Path(__file__).parent
FILES = ("Dockerfile", "compose.yaml", "kubernetes/**/*.yaml", "work-pools/*.json")
OWN = "consistency-pipeline"
PART, DIGEST = r"(?:\w[\w.-]*(?::\d+)?/)*", r"(?:@sha256:[0-9a-f]{64})?"
OTHERS = re.compile(rf"((?:^FROM | image: ){PART}(?!{OWN})[\w.-]+:\w[\w.-]*){DIGEST}(?![\w./@-])", re.M)
OURS = re.compile(rf"{PART}{OWN}:\w[\w.-]*{DIGEST}")
MANIFESTS = ", ".join(
    f"application/vnd.{kind}+json"
    for kind in ("oci.image.index.v1", "docker.distribution.manifest.list.v2", "oci.image.manifest.v1")
    + ("docker.distribution.manifest.v2",)
)
HUB = "registry-1.docker.io"
SECONDS = 30


def digest_of(image: str) -> str:
    """Return sha256:... of what a registry has under NAME:TAG: its index of machines, or its only manifest."""
    name, _, tag = image.rpartition(":")
    host, slash, path = name.partition("/")
    if not slash or not (re.search("[.:]", host) or host == "localhost"):  # as every client reads a name without host
        host, path = HUB, name if slash else f"library/{name}"
    scheme = "http" if host.partition(":")[0] in ("127.0.0.1", "localhost") else "https"
    url, headers = f"{scheme}://{host}/v2/{path}/manifests/{tag}", {"Accept": MANIFESTS}
    try:
        manifest = _read(url, headers)
    except urllib.error.HTTPError as error:
        if error.code != 401:
            raise
        manifest = _read(url, {**headers, "Authorization": f"Bearer {_token(error.headers['WWW-Authenticate'])}"})
    return f"sha256:{hashlib.sha256(manifest).hexdigest()}"


def _read(url: str, headers: dict[str, str]) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=SECONDS) as answer:
        return answer.read()


def _token(challenge: str) -> str:
    """Return the token for anybody that a registry's challenge says where to get."""
    said = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    query = urlencode({key: said[key] for key in ("service", "scope") if key in said})
    return json.loads(_read(f"{said['realm']}?{query}", {}))["token"]


def pin(folder: Path, own: str | None) -> list[str]:
    """Rewrite the files below `folder`; return every image with its digest. Nothing is written unless all are known."""
    known: dict[str, str] = {}

    def pinned(image: str) -> str:
        if image not in known:
            known[image] = f"{image}@{digest_of(image)}"
        return known[image]

    texts = {}
    for path in sorted(file for pattern in FILES for file in folder.glob(pattern)):
        text = OTHERS.sub(lambda found: found[1].replace(name := found[1].split()[-1], pinned(name)), path.read_text())
        texts[path] = OURS.sub(lambda _: pinned(own), text) if own else text
    for path, text in texts.items():
        path.write_text(text)
    return list(known.values())


def main() -> int:
    """Pin; return 1 where a registry does not answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", metavar="NAME:TAG", help=f".../{OWN}:TAG in a registry")
    given = parser.parse_args().image
    if given and not OURS.fullmatch(given):
        parser.error(f"--image {given}: expected REGISTRY/{OWN}:TAG")
    try:
        print("\n".join(pin(INFRA, given)))
    except (OSError, ValueError, KeyError) as error:  # HTTPError and URLError are OSErrors
        print(f"pin: nothing is changed, a registry did not answer: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
