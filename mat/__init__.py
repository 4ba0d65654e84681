"""Modular Adaptive Training: train only the units whose mNTK eigenvalue says so (Shi et al., NeurIPS 2023)."""
