"""What judges the images: frozen features and trained heads on them."""
