"""Where the units of known models are, found by the shape of modules."""

from mat.adapters.find import find_units, finder

__all__ = ["find_units", "finder"]
