"""Benchmarks that ship with the package; `arat-fast bench` runs them."""
