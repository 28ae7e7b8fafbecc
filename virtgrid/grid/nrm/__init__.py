"""The network manager (NRM): segments, and bandwidth between sites, promised to coordinators."""
