"""Real servers from Debian packages on a test host: two namespaces and a cable, for tests and benches."""
