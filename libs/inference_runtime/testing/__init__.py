"""Tools for tests, and for running a whole installation on one machine. Import what you need from its modules."""
