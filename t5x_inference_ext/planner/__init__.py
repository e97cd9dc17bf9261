"""The paper's analytical model: the cost of each layout on a slice, and the best one.

See docs/planner.md.
"""
