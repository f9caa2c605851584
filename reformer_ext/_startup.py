"""What the commands need before torch is imported, which takes seconds."""

from __future__ import annotations

import os
import signal
import sys

__all__ = ["begin", "ready"]


def begin() -> None:
    """If this process is the command line, Ctrl-C ends it without a traceback until it is ready."""
    starts = os.path.basename(sys.argv[0]).partition(".")[0] == "reformer" if sys.argv else False
    module = sys.orig_argv[1:3] == ["-m", "reformer_ext"]
    if (starts or module) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def ready() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt, and a standard stream that was closed is a void.

    A file opened in place of a closed one would get what libraries write to the standard error.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    if sys.stderr is None:  # print(file=None) would go to the standard output
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
