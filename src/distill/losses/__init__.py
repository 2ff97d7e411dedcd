"""One paper, one file: the function that is the paper, and the thin module under it."""
