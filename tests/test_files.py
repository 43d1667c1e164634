"""Files that are there completely or not at all, and what is not a file."""

import os
from pathlib import Path

import pytest

from m2c.bundle.files import read_small, write_atomic
from m2c.errors import BadInput, UsageError


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    """A rename would put a file in the place of a link, a pipe or a device."""
    target = tmp_path / "target"
    target.write_bytes(b"mine")
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.iterdir())
    for name in ("link", "dangling", "pipe"):
        with pytest.raises(UsageError, match="not a regular file"):
            write_atomic(tmp_path / name, b"ours")
    assert sorted(tmp_path.iterdir()) == before
    assert target.read_bytes() == b"mine"
    assert (tmp_path / "link").is_symlink()


def test_a_small_file_is_small(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    assert read_small(path, limit=100) == bytes(100)
    with pytest.raises(BadInput, match="larger than the 99 bytes"):
        read_small(path, limit=99)
