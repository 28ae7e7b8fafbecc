"""Two-phase co-allocation, as tables and arithmetic: no clock, no socket, no database.

``provider`` is a hold as its provider sees it, ``coordinator`` a reservation as its coordinator does,
``windows`` finds when something could be had. Why it cannot end half done:
docs/design/0009-co-allocation.md.
"""
