import os

import pytest

from lipfast.data.files import atomic_write


def test_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    for content in (b"first", b"second"):
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["body", "fsync", "replace"])
def test_a_failure_keeps_the_old_file(tmp_path, monkeypatch, step):
    def refuse(*args):
        raise OSError("disk full")

    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    if step != "body":
        monkeypatch.setattr(os, step, refuse)

    def write():
        with atomic_write(path) as temporary:
            temporary.write_bytes(b"half of the ne")
            if step == "body":
                refuse()

    with pytest.raises(OSError, match="disk full"):
        write()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_flushed_before_the_name_changes(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    with atomic_write(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"new")
    assert calls == ["fsync", "replace", "fsync"]
