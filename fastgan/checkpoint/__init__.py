"""Network files, the state of a run, and EDM pickles that are read without being run."""
