"""Clients, addresses and errors of S3."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from flows.errors import UserError

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
    if not uri.startswith(("http://", "https://")):
        return uri
    parts = urlsplit(uri)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


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
    return session.client("s3", config=config)


def list_objects(client: Any, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    """Yield the objects under a prefix as S3 describes them, page by page."""
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        yield from page.get("Contents", ())
