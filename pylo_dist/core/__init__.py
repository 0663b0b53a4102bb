"""Geometry of sharded tensors, and what a learned rule is. Imports nothing of the package."""
