"""Feature networks and the Frechet distances between their statistics."""
