"""Measurements on this machine, side by side in one process; each has ``run`` (rows of plain data) and ``table`` (rows for people)."""
