"""One migration: plan, preflight, policy, gate, driver, recovery."""
