"""A bucket with training states, and a machine that takes one over."""

import json

from flows.checkpoints.s3_store import HEAD

URI = "s3://states/in flight"
KEY = "0123456789abcdef0123"
NAME = "student-0123456789abcdef"


def take_over(s3, monkeypatch):
    """Let the lease that is held run out, as if its holder had lost the network."""
    key = f"in flight/{NAME}/{HEAD}"
    text = json.loads(s3.get_object(Bucket="states", Key=key)["Body"].read())
    s3.put_object(Bucket="states", Key=key, Body=json.dumps({**text, "lease_seconds": -1}).encode())
