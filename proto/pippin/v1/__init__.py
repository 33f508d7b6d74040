"""The messages and services of pippin, and the interfaces of its components (interfaces/*.textproto)."""
