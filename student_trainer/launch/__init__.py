"""Starting a run's workers: by Ray, which places them on nodes and starts them again where they die, or torchrun."""
