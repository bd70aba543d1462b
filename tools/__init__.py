"""What authors and teachers use: run it from the top folder, as in `python -m tools.book`.

No chapter imports it, and no wheel carries it.
"""
