"""Interpretability techniques for a notebook, on torch and transformers: one family a module."""
