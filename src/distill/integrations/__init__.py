"""Where distill meets other frameworks: each file imports its own, and nothing imports these files."""
