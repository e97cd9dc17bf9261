"""The paper's analytical model: the cost of each layout on a slice, and the best layouts.

See docs/planner.md.
"""
