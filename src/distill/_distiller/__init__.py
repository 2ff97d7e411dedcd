"""The only package that knows models exist: it calls, freezes and taps them and adds the losses up."""
