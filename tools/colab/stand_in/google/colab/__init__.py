"""Stands in for the module by which a notebook knows that it runs on Colab."""
