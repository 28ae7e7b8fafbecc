"""What people and other systems look at over HTTP: a page, a REST interface, metrics."""
