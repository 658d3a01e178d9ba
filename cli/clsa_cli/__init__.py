"""The command line: one file per command. It parses, calls `clsa`, and prints; nothing else."""
