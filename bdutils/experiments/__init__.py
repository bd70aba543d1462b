"""Recorded studies: what is run, how, and what came out."""
