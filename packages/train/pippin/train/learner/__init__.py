"""Learners: how gradients become new parameters. Configs are in `config`; nothing is imported here."""
