"""A node of the grid: its sandboxes, and the NodeManager, a pilot job that has one of them made."""
