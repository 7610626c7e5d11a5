"""Methods side by side on the same data: the grid, its statistics, and the report."""
