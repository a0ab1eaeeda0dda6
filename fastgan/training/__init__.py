"""The method: one iteration, its losses and updates, and the loop around it."""
