"""Print the tables of states, for docs/reference/co-allocation.md and jobs.md."""

from __future__ import annotations

from virtgrid.grid.coalloc import coordinator, crew, job, provider

print(coordinator.markdown())
print(provider.markdown())
print(job.markdown())
print(crew.markdown(), end="")
