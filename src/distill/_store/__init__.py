"""A teacher on disk: what writes, reads and checks the files that README.md describes."""
