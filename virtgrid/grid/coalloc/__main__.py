"""Print both tables of states, for docs/reference/co-allocation.md."""

from __future__ import annotations

from virtgrid.grid.coalloc import coordinator, provider

print(coordinator.markdown())
print(provider.markdown(), end="")
