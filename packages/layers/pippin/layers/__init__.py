"""Layers, caches and models, each a component."""
