"""The paper's analytical model: what a layout costs on a slice, and which to take. docs/planner.md."""
