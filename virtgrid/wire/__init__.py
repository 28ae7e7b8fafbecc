"""Talking to other programs: JSON-RPC lines over TLS or a unix socket, and what survives a dropped line.

``endpoint`` has what others need: ``dial`` and ``listen``. ``message`` and ``lines`` are the format, pure;
``line`` is one connection, ``reception`` takes calls. ``tls`` says who is at the other end, ``identity`` what
such a one may ask, ``pki`` makes certificates. ``outbox`` and ``answers`` are what two ends keep so that a
dropped line loses nothing and does nothing twice; pure too. ``seal`` signs texts. Reference:
docs/reference/wire.md.
"""
