"""What goes over the wire between the parts of the grid: strict models, each with its bounds.

``common`` has the types, ``node`` the conversation of a pilot with its CRM, ``host`` that of a pilot with the
root agent of its host, ``ticket`` what a ticket says, ``coalloc`` how resources are promised.
"""
