"""Accelerators that need not be here: what a device of each kind has, and what its compiler says of a program."""
