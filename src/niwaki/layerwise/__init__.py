"""Pruning of one layer by itself: its outputs on data are to stay what they were. Pure functions of a weight matrix and second moments."""
