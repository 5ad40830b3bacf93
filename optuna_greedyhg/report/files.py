"""Files that are whole or not there: a reader, a full disk or a killed process never leaves half of one."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: str) -> None:
    """Writes text, in UTF-8, to a file beside the target that then takes its place, behind a symbolic link too.

    Raises:
        OSError: If the folder does not exist or the file cannot be written; the old one is then as it was.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_file():  # a device or a pipe: nothing may take its place
        target.write_text(content, encoding="utf-8")
        return
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.unfinished")
    try:
        unfinished.write_text(content, encoding="utf-8")
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
