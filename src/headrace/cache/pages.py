"""Which KV pages are free and how many owners the others have.

A page is an integer index into the pools of the runner. Knows nothing of tokens, requests or
tensors. Invariant: every page is either free or has at least one owner.
"""

from collections.abc import Sequence


class PagePool:
    """Hands out pages; `take` pairs with `release`, `share` adds an owner."""

    def __init__(self, count: int, page_size: int) -> None:
        self.count = count
        self.page_size = page_size
        self._free = list(range(count - 1, -1, -1))
        self._extra_owners: dict[int, int] = {}

    @property
    def free(self) -> int:
        """Number of free pages."""
        return len(self._free)

    @property
    def shared(self) -> int:
        """Number of pages with several owners."""
        return len(self._extra_owners)

    def take(self, count: int) -> list[int] | None:
        """`count` pages with one owner each, or None when there are not enough."""
        if count > len(self._free):
            return None
        if count == 0:
            return []
        taken = self._free[-count:]
        del self._free[-count:]
        taken.reverse()
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """Add an owner to each page."""
        for page in pages:
            self._extra_owners[page] = self._extra_owners.get(page, 0) + 1

    def release(self, pages: Sequence[int]) -> None:
        """Take one owner away from each page; a page without owners is free."""
        if not self._extra_owners:
            self._free.extend(pages)
            return
        for page in pages:
            owners = self._extra_owners.get(page, 0)
            if owners == 0:
                self._free.append(page)
            elif owners == 1:
                del self._extra_owners[page]
            else:
                self._extra_owners[page] = owners - 1

    def check(self) -> None:
        """Assert the invariant (tests and idle checks)."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & self._extra_owners.keys(), "a free page has owners"
        assert all(0 <= page < self.count for page in free), "a page does not exist"
