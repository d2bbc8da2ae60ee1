"""A bucket with training states, and a machine that takes one over."""

import json
import os

from flows.checkpoints import store
from flows.checkpoints.s3_store import HEAD, Head

URI = "s3://states/in flight"
KEY = "0123456789abcdef0123"
NAME = "student-0123456789abcdef"


def take_over(s3, monkeypatch):
    """Let the lease that is held run out, as if its holder had lost the network."""
    key = f"in flight/{NAME}/{HEAD}"
    text = json.loads(s3.get_object(Bucket="states", Key=key)["Body"].read())
    s3.put_object(Bucket="states", Key=key, Body=json.dumps({**text, "lease_seconds": -1}).encode())


class Worker:
    """A machine with a workspace of its own; what it is told is kept."""

    def __init__(self, folder):
        self.folder, self.said, self.waited = folder, [], 0

    def hold(self):
        return store.hold_checkpoint(self.folder, "student", KEY, self.on_wait, self.said.append)

    def on_wait(self):
        self.waited += 1

    def heard(self, part):
        return any(part in line for line in self.said)


def save(folder, step, *, size=2000):
    """Save a state as a training does: built aside, renamed; the log is appended to."""
    final = folder / f"step-{step:09d}"
    partial = folder / ".partial"
    partial.mkdir(parents=True)
    (partial / "tensors.safetensors").write_bytes(bytes([step % 256]) * size)
    (partial / "state.json").write_text(json.dumps({"step": step}))
    os.replace(partial, final)
    (folder / "log").mkdir(exist_ok=True)
    with (folder / "log" / "metrics.jsonl").open("a") as file:
        file.write(f"{step}\n")


def steps(folder):
    found = sorted(path for path in folder.glob("step-*"))
    for path in found:
        number = int(path.name.removeprefix("step-"))
        assert json.loads((path / "state.json").read_text()) == {"step": number}
        assert set((path / "tensors.safetensors").read_bytes()) == {number % 256}
    return [int(path.name.removeprefix("step-")) for path in found]


def head(client, name=NAME):
    answer = client.get_object(Bucket="states", Key=f"in flight/{name}/{HEAD}")
    return Head.of(answer["Body"].read())


def objects(client):
    listed = client.list_objects_v2(Bucket="states").get("Contents", ())
    return {entry["Key"] for entry in listed if not entry["Key"].endswith(HEAD)}


def needed(client):
    """The keys that the states of all heads need."""
    found = set()
    for name in head(client).states:
        place = f"in flight/{NAME}"
        found.add(f"{place}/{name}")
        files = json.loads(client.get_object(Bucket="states", Key=f"{place}/{name}")["Body"].read())
        found |= {f"{place}/{stored['key']}" for stored in files.values()}
    return found
