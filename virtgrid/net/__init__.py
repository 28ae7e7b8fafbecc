"""Kernel networking: namespaces, links, capture on a tap, probes."""
