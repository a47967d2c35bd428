"""The devices: mesh and placements, facts about chips, and what a program costs."""
