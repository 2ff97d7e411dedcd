"""How large losses are computed: README.md in this folder says which file does what."""
