"""Why a file is refused."""

from __future__ import annotations


class Refusal(Exception):
    """The file will not be taken in.

    Attributes:
        code: `unsafe_file`, `unsupported_format`, `damaged_file`, `weights_not_finite`, `dataset_invalid` or `too_large`.
        message: what was found, where; never longer than 500 characters.
        advice: what the user can do.
    """

    def __init__(self, code: str, message: str, advice: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = printable(message)[:500]
        self.advice = advice


def printable(text: str) -> str:
    """Replace control characters, surrogates and direction overrides: refused names end up on screens and in logs."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def shown(value: object) -> str:
    """Return a stranger's value for a message: a small number as it is, else its kind. `repr` of nested lists can take for ever."""
    return str(value) if type(value) is int and value.bit_length() <= 64 else f"a value of type {type(value).__name__}"


def damaged(message: str) -> Refusal:
    """Return the refusal of a truncated or self-contradicting file."""
    return Refusal("damaged_file", message, "The file is incomplete or was altered; export and upload it again.")
