"""Words everyone shares: errors, units, clocks, the journal. Imports nothing of ours."""
