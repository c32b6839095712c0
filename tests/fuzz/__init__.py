"""Random programs of collectives and messages, and random bytes for parsers (parsers/)."""
