"""Messages of one line: warnings in the log, and what an error says."""

from __future__ import annotations

import logging

from mmengine.logging import print_log


def warn(message: str) -> None:
    """Log a warning."""
    print_log(message, logger='current', level=logging.WARNING)


def inform(message: str) -> None:
    """Log what is good to know."""
    print_log(message, logger='current', level=logging.INFO)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class where it has none."""
    return str(error).strip().split('\n')[0] or type(error).__name__


def printable(text: str) -> str:
    """The first line of a text from a file, with ? for characters that would control a terminal."""
    return ''.join(char if char.isprintable() else '?' for char in text.split('\n')[0])
