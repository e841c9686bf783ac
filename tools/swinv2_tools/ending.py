"""End a tool on Ctrl-C or SIGTERM with one line instead of a traceback, and with nothing half done.

A tool imports this first, because its other imports may take seconds, and ends with `run(main)`. It needs only the
standard library, because some tools run before anything is installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time

WORDS = {signal.SIGINT: 'interrupted', signal.SIGTERM: 'terminated'}
SILENT = 'SWINV2_MM_SILENT_END'  # environment variable of a tool that another tool runs: the outer one prints the line
PR_SET_PDEATHSIG = 1  # of linux/prctl.h: the signal that a process gets when its parent dies
TOGETHER = 3  # seconds: a terminal and a parent both send a signal, and users are impatient; one is enough
PATIENCE = 30  # seconds that a child may take to tidy up, on a machine with other work

_raised = float('-inf')  # when the last signal became an exception


class Ended(KeyboardInterrupt):
    """A signal that ends the tool, raised so that files and processes are cleaned up. Its text is added to the line."""

    number = signal.SIGINT


def run(main):
    """Return what ``main()`` returns; SIGINT and SIGTERM end it with one line and exit code 130 or 143."""
    _handle(_raise)
    os.register_at_fork(after_in_child=_leave_to_parent)
    try:
        return main()
    except KeyboardInterrupt as end:
        number, text = getattr(end, 'number', signal.SIGINT), str(end)
    _handle(signal.SIG_IGN)
    _say(number, text)
    _end_children()
    _handle(signal.SIG_DFL)
    sys.exit(128 + number)


def _handle(handler):
    for number in WORDS:
        if signal.getsignal(number) is not signal.SIG_IGN or handler is signal.SIG_DFL:
            signal.signal(number, handler)


def _raise(number, frame):
    global _raised
    if time.monotonic() - _raised < TOGETHER:
        return
    _raised = time.monotonic()
    signal.signal(signal.SIGCHLD, lambda *_: None)  # PyTorch's handler raises an error for a worker that has ended too
    end = Ended()
    end.number = number
    raise end


def _exit(number, frame):
    """End at once: during imports there is nothing to clean up, and libraries might swallow an exception."""
    _say(number)
    os._exit(128 + number)


def _say(number, text=''):
    if SILENT not in os.environ:
        start = '\n' if sys.stderr.isatty() else ''  # the cursor is behind ^C or a progress bar
        line = f'{start}{os.path.basename(sys.argv[0])}: {WORDS[number]}{": " * bool(text)}{text}\n'
        with contextlib.suppress(OSError):
            os.write(2, line.encode(errors='backslashreplace'))


def _leave_to_parent():
    """Have a process that the tool forks, such as a data loader worker, end silently with the tool."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.excepthook = lambda *_: None  # the thread that sends tensors fails when the tool has ended
    with contextlib.suppress(OSError, AttributeError):  # of Linux; else a killed tool may leave a worker that waits
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))


def _end_children():
    import multiprocessing

    children = multiprocessing.active_children()
    for child in children:
        child.terminate()
    for child in children:
        child.join(PATIENCE)
        child.kill()


_tools = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
_main = getattr(sys.modules['__main__'], '__file__', None)
if _main and os.path.realpath(_main).startswith(os.path.join(_tools, '')):  # not in a test
    _handle(_exit)
