"""Data sources and batch streams."""
