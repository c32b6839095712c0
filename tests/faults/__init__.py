"""Each fault made for real, and what every rank sees of it: ``make fault-table``."""
