"""The app of a Space. It is copied as it is, and imports nothing of the package."""
