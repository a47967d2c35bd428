"""What frozen features are worth: features of a split, neighbours, probes, scores, geometry."""
