"""What ``benchmark.py`` runs: one module for each of its subcommands."""
