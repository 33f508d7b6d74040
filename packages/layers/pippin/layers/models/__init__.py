"""Architectures, one a file: functions that return the config tree of a whole model."""
