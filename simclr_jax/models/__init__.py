"""Encoders, the heads on top of them, and the networks that are trained."""
