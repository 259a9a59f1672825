"""Names and contracts of other libraries, on top of tpcore."""
