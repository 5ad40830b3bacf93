import os
from pathlib import Path

import pytest

from optuna_greedyhg.report.files import write_whole


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    (tmp_path / "page").write_text("old")
    write_whole(tmp_path / "page", "new α")
    assert (tmp_path / "page").read_text(encoding="utf-8") == "new α"
    assert [path.name for path in tmp_path.iterdir()] == ["page"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "page").write_text("old")

    def fill_the_disk(self, content, encoding):
        with self.open("w") as file:
            file.write(content[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fill_the_disk)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "page", "new")
    assert (tmp_path / "page").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["page"]


def test_a_device_is_written_to_and_not_replaced():
    before = os.stat(os.devnull)
    write_whole(os.devnull, "gone")
    assert os.stat(os.devnull).st_rdev == before.st_rdev
