"""Layers whose backward pass skips what is frozen: one file per kind of product."""
