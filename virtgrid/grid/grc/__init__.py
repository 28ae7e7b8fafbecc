"""The coordinator (GRC): resources of several sites and of the network between them, all or none."""
