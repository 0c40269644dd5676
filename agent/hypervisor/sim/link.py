"""One direction of a host's network link, shared max-min fairly by its transfers, each with a limit of its own."""

from collections.abc import Callable

from agent.transfer.shares import Flow, fair


class Share:
    """One transfer's share of a link."""

    def __init__(self, link: "Link", limit: int, changed: Callable[[float], None]) -> None:
        self._link = link
        self.limit = limit
        self.changed = changed
        self.rate = 0.0
        """The current share in bytes per second."""

    def set_limit(self, limit: int) -> None:
        """Set the limit in bytes per second (0: none) and divide the link anew."""
        self.limit = limit
        self._link.divide()

    def leave(self) -> None:
        self._link.shares.remove(self)
        self._link.divide()


class Link:
    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.shares: list[Share] = []

    def join(self, limit: int, changed: Callable[[float], None]) -> Share:
        """Add a share and divide the link anew. `changed` is called with each new rate of the share."""
        share = Share(self, limit, changed)
        self.shares.append(share)
        self.divide()
        return share

    def divide(self) -> None:
        flows = [Flow(("link",), most=share.limit) for share in self.shares]
        for share, rate in zip(self.shares, fair(flows, {"link": self.rate}), strict=True):
            if share.rate != rate:
                share.rate = rate
                share.changed(rate)
