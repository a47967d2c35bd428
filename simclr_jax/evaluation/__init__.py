"""Evaluation of frozen features: of a split, nearest neighbours, linear probes, their selection, scores, geometry."""
