"""What a recipe comes to on a cluster, by arithmetic alone: configuration in, values out. No I/O, no torch."""
