"""Where units are: each file finds them by the shape of modules, not of whole models."""

from mat.adapters.find import find_units, finder

__all__ = ["find_units", "finder"]
