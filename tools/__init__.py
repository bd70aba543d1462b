"""Tools for authors and teachers: no chapter imports them."""
