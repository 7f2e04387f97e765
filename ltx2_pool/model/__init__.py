"""What runs in the children; the only wing that imports torch."""
