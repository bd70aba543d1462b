"""Defenses, each written by the chapter that explains it."""
