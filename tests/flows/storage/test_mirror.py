"""A bucket in a folder and back: only what is new is copied, and nothing lands outside."""

import os

import pytest

from flows.errors import UserError
from flows.storage.mirror import mirror
from servers import shared_s3

pytestmark = pytest.mark.slow
s3 = shared_s3("kept", "again", "hostile")
NAMES = ("files/a", "50% #1 ü")


def test_what_is_new_is_copied_both_ways(s3, tmp_path):
    for name in NAMES:
        s3.put_object(Bucket="kept", Key=f"below/{name}", Body=name.encode())
    s3.put_object(Bucket="kept", Key="beside", Body=b"")
    assert [mirror("s3://kept/below", str(tmp_path / "folder")) for _ in range(2)] == [2, 0]
    s3.put_object(Bucket="kept", Key="below/files/a", Body=b"FILES/A")  # as long as before
    os.utime(tmp_path / "folder" / "files" / "a", (0, 0))
    assert mirror("s3://kept/below", str(tmp_path / "folder")) == 1
    assert [mirror(str(tmp_path / "folder"), "s3://again") for _ in range(2)] == [2, 0]
    found = {name: s3.get_object(Bucket="again", Key=name)["Body"].read() for name in NAMES}
    assert found == {"files/a": b"FILES/A", "50% #1 ü": "50% #1 ü".encode()}


def test_what_makes_no_sense_is_one_line(s3, tmp_path):
    s3.put_object(Bucket="hostile", Key="../outside", Body=b"")
    for source, target, words in (
        ("s3://hostile", str(tmp_path / "folder"), "points outside"),
        ("s3://hostile", "s3://again", "the other a folder"),
        (str(tmp_path / "nowhere"), "s3://again", "no such folder"),
        ("s3://absent", str(tmp_path / "folder"), "absent"),
    ):
        with pytest.raises(UserError, match=words) as refused:
            mirror(source, target)
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "outside").exists()
