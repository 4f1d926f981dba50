"""Fair sharing between tenants: start-time fair queueing over tokens (Goyal, Vin, Cheng, 1996).

Each tenant has a clock that runs by the tokens computed for it, divided by its weight. Waiting
requests are looked at in the order of the clocks, as if each had run already; so tenants that all
want more than they get share the machine by weight, whatever number of requests each sends. Who
comes back after a pause starts at the clock of those who are there: nobody saves up. Order within a
tenant is the policy's. Knows no keys and no budgets.
"""

from collections.abc import Sequence

from headrace.scheduler.request import Request


class Account:
    """The clock of one tenant, and how many of its requests wait or run."""

    __slots__ = ("active", "clock", "weight")

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.clock = 0.0
        self.active = 0

    def charge(self, tokens: int) -> None:
        """Tokens were computed for this tenant."""
        self.clock += tokens / self.weight


class Shares:
    """The accounts of tenants with requests; forgets the others."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}

    def join(self, request: Request) -> None:
        """A request arrived."""
        spec = request.spec
        account = self._accounts.get(spec.tenant)
        if account is None:
            account = self._accounts[spec.tenant] = Account(spec.weight)
            others = [other.clock for other in self._accounts.values() if other.active]
            account.clock = min(others, default=0.0)
        account.active += 1
        request.account = account

    def leave(self, request: Request) -> None:
        """A request ended."""
        account = self._accounts[request.spec.tenant]
        account.active -= 1
        if not account.active:
            del self._accounts[request.spec.tenant]

    def order(self, waiting: Sequence[Request]) -> list[Request]:
        """The requests by the time at which a fair machine would start them."""
        if len(self._accounts) < 2:
            return list(waiting)
        clocks = {name: account.clock for name, account in self._accounts.items()}
        starts: list[float] = []
        for request in waiting:
            spec = request.spec
            starts.append(clocks[spec.tenant])
            clocks[spec.tenant] += request.known / self._accounts[spec.tenant].weight
        order = sorted(range(len(waiting)), key=starts.__getitem__)
        return [waiting[index] for index in order]
