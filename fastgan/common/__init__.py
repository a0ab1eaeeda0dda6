"""What every room stands on: errors, files, noise, processes, precision."""
