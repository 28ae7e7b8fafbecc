"""The grid: coordinators, compute managers, network managers and the nodes they drive.

They meet in ``messages`` and import each other nowhere else.
"""
