"""Studies of the v1 paper: grids of runs as data (definitions), and their cells on disk (grid)."""
