"""Interpretability techniques for a notebook: plain Python on torch and transformers, one family a module."""
