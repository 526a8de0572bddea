"""The form of the doctor's findings, and how it reads small files and errors."""

from pathlib import Path


def ok(text: str) -> str:
    return f"ok    {text}"


def note(text: str) -> str:
    return f"note  {text}"


def fault(text: str) -> str:
    return f"FAULT {text}"


def read_system_file(path: Path) -> str:
    """Returns the text of a small file, or an empty string where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def describe_error(error: BaseException) -> str:
    """Returns an error as one line of at most 300 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
