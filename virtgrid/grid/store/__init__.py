"""What the parts of the grid must not forget, in one SQLite file each.

``database`` opens it and keeps its schema (``schema``, ``revisions``) current; ``units`` are things that
only one hold can have at a time (nodes, addresses, segments), ``levels`` what many share (bandwidth),
``promises`` the holds themselves, ``reservations`` a coordinator's decisions.
"""
