"""Accelerators by name, what a run changes on each, and what the compilers of each say of a training step."""
