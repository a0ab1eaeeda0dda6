"""Speed and memory of the kernels beside what else could run, and the targets they are held to."""
