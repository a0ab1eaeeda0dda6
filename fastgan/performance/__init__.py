"""What an iteration costs: counted, budgeted and profiled."""
