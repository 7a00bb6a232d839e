"""Starting a run's workers on Ray, and again where they die."""
