"""The exit codes of ``drover``."""

from enum import IntEnum


class ExitCode(IntEnum):
    DONE = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    REFUSED = 4
    UNKNOWN = 5
    INTERRUPTED = 130
    PIPE_CLOSED = 141


EPILOG = """\b
Exit codes:
  0    done
  1    the migration failed or was cancelled; the guest runs at the source as before
  2    usage: the command line or a configuration file is wrong, or a daemon cannot start; nothing was changed
  3    the server, or a host that is needed, cannot be reached
  4    refused before the guest was touched (also: no such guest, host or migration; no slot within --wait)
  5    the outcome is unknown: ask again, and do not start the guest by hand;
       or the guest runs nowhere (its QEMU died): the message says so, and that it can be started again
  130  interrupted while watching, or not confirmed; the migration goes on
  141  the reader of the output closed it (as in "| head"); the migration goes on
"""
