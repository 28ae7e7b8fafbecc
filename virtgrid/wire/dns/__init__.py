"""Dynamic DNS (RFC 2136) signed with TSIG (RFC 8945): what a name's records are, and changing them."""
