"""In the place of ipykernel (see the package above)."""
