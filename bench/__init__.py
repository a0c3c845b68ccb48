"""Benchmarks: what is measured, how, and beside which figures."""
