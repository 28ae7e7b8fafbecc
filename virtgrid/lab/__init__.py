"""Several sites on one machine: namespaces, a WAN, guests, load, faults."""
