"""Agents scored on investigations with Inspect AI: what is asked, where it is asked, by whom, and the score."""
