"""The devices: mesh and placements, data of chips, and the cost of a program."""
