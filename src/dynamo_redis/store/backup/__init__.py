"""Backups of a deployment: the registry's records and the objects, in one file."""
