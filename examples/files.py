"""Files of the user's: what cannot be read or written ends in an InputError, and nothing is left half written."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from sentences import InputError


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file without their ends, with which system it was written on being no matter."""
    content = read_bytes(path)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise InputError(f"{path}:{line}: the line is not UTF-8 text: {error.reason}") from error
    if "\0" in text:
        line = 1 + text.count("\n", 0, text.index("\0"))
        raise InputError(f"{path}:{line}: the line has a zero byte, so this is no UTF-8 text")
    # \r\r\n is what a Windows file becomes in a second conversion; files put together have a BOM in the middle.
    return [line.removeprefix("\ufeff") for line in re.split("\r{0,2}\n|\r", text)]


def check_writable(path: Path) -> None:
    """Makes the folder of a file that is to be written: what is in its way shows before the work and not behind it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {path.parent}: {error.strerror}") from error
    write_bytes(path, None)


def write_bytes(path: Path, content: bytes | None) -> None:
    """All of it or nothing: it is written beside its place and then moved there. Without content it is only tried."""
    try:
        path = path.resolve()
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():  # /dev/null
            path.write_bytes(content or b"")
            return
        part = path.with_name(path.name + ".part")
        try:
            part.write_bytes(content or b"")
            if content is not None:
                part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
