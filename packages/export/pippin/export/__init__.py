"""Compression and export to Apple devices."""
