"""The commands that need only the store: each module has SUMMARY, add_arguments and run."""
