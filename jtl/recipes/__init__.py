"""Whole jobs behind the command line, written with public functions alone."""
