"""The metrics service: a singleton that counts the usage of every request once."""
