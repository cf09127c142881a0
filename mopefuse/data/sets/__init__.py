"""Data sets that mopefuse prepares or generates, one file each."""
