"""Attacks, one module per kind of data, exported from the chapters that build them."""
