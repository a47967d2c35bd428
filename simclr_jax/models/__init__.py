"""The encoder, the heads on top of it, and the two networks that the jobs train."""
