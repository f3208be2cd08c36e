"""Measurements, each in a folder of its own; README.md lists the questions that they answer."""
