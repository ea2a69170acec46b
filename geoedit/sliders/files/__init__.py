"""Slider files of every dialect."""
