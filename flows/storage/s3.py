"""Clients, addresses and errors of S3."""

import base64
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flows.errors import UserError

ADDRESS = re.compile(r"""[a-zA-Z][\w+.-]*://[^\s"'<>]+""")
TIMEOUT = 30  # seconds without a response
S3_WORKERS = 16  # objects of a prefix that are downloaded at once
DENIED = "access denied; see AWS_PROFILE or AWS_ACCESS_KEY_ID, and the policy of the bucket"
S3_CAUSES = {
    "NoSuchKey": "no such object",
    "404": "no such object",
    "NoSuchBucket": "no such bucket",
    "AccessDenied": DENIED,
    "403": DENIED,
    "SlowDown": "the store asks to slow down, after several tries",
    "503": "the store is not available, after several tries",
    "507": "no space left in the store",
    "QuotaExceeded": "no space left in the store",
    "EntityTooLarge": "the store takes no objects as large as this",
    "RequestTimeTooSkewed": "the clock of this machine differs from the store's; set it right",
}


def public_uri(uri: str) -> str:
    """Return `uri` without user, password and query, which may hold secrets."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme in ("s3", "file", "sqlite"):
        return uri
    place = re.split("[?#]", rest, maxsplit=1)[0]
    host, slash, path = place.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def public_text(text: str) -> str:
    """Return `text` with every address in it as `public_uri` shows it."""
    return ADDRESS.sub(lambda found: public_uri(found[0]), text)


@contextmanager
def s3_errors(uri: str) -> Iterator[None]:
    """Turn S3 failures into a one-line UserError."""
    try:
        import botocore.exceptions as boto
        from boto3.exceptions import Boto3Error
        from s3transfer.exceptions import RetriesExceededError
    except ImportError as error:
        raise UserError(f"{public_uri(uri)}: s3:// needs the package boto3") from error
    try:
        yield
    except boto.ClientError as error:
        code, message = error.response["Error"]["Code"], error.response["Error"].get("Message", "")
        raise UserError(f"{public_uri(uri)}: {S3_CAUSES.get(code) or f'{code} {message}'.strip()}") from error
    except (boto.BotoCoreError, Boto3Error, RetriesExceededError, OSError, ValueError) as error:
        raise UserError(f"{public_uri(uri)}: {' '.join(str(error).split())}") from error


def s3_address(uri: str) -> tuple[str, str]:
    """Split s3://bucket/key, the key taken literally (including `?` and `#`)."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not uri.startswith("s3://") or not bucket:
        raise UserError(f"{public_uri(uri)}: not an S3 address; write s3://bucket/key")
    return bucket, key


def s3_client() -> Any:
    """Return a client for AWS_ENDPOINT_URL, or AWS; without credentials it reads public buckets."""
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    session = boto3.session.Session()
    config = Config(
        connect_timeout=10,
        read_timeout=TIMEOUT,
        retries={"mode": "standard", "total_max_attempts": 3},
        max_pool_connections=S3_WORKERS,
        signature_version=None if session.get_credentials() else UNSIGNED,
    )
    client = session.client("s3", config=config)
    if not sends_checksums(client):
        client.meta.events.register("before-call.s3.DeleteObjects", _prove_by_md5)
    return client


def sends_checksums(client: Any) -> bool:
    """Whether requests may carry the checksum headers of 2022, which some stores refuse.

    AWS_REQUEST_CHECKSUM_CALCULATION=when_required, or `request_checksum_calculation` of an AWS profile, forbids them.
    """
    return bool(client.meta.config.request_checksum_calculation != "when_required")


def _prove_by_md5(params: Any, **_: Any) -> None:
    """Send Content-MD5 with a request that must prove its body: all that stores without the new headers know."""
    del params["context"]["checksum"]
    digest = hashlib.md5(params["body"], usedforsecurity=False).digest()
    params["headers"]["Content-MD5"] = base64.b64encode(digest).decode()


def addressing_style() -> str | None:
    """Return `addressing_style` of the AWS profile in force, `virtual` or `path`, if it names one."""
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session

    try:
        section = Session().get_scoped_config().get("s3")
    except BotoCoreError as error:
        raise UserError(f"AWS's configuration files: {error}") from None
    return section.get("addressing_style") if isinstance(section, dict) else None


def list_objects(client: Any, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    """Yield the objects under a prefix as S3 describes them, page by page."""
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        yield from page.get("Contents", ())
