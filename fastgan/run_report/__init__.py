"""One HTML page about a training run, with nothing outside of it."""
