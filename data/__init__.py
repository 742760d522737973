"""Data sets as packed integers, and the generators of those that can be generated."""
