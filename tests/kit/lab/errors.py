"""What goes wrong in the lab, as one kind of exception whose text says what to do next."""


class LabError(Exception):
    """The lab could not do what was asked; the message holds the command and its error output."""


class LabTimeoutError(LabError):
    """Something did not become true within its deadline; the message says what was waited for."""
