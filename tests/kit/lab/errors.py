"""The lab's exceptions; their text says what to do next."""


class LabError(Exception):
    """A failed action of the lab; the message has the command and its error output."""


class LabTimeoutError(LabError):
    """A condition that did not become true within its deadline; the message names the condition."""
