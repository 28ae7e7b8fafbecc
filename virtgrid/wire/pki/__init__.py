"""Certificates of the grid: made, signed, put where libvirt, QEMU and virtgrid look for them, and revoked.

``signing`` makes certificates, pure. ``request`` is what a host asks for and what an authority reads.
``authority`` is the directory of the one who signs, ``places`` that of a host. ``standing`` says in words how
long a certificate is good. Reference: docs/reference/pki.md; reasons: docs/design/0008-identities.md.
"""
