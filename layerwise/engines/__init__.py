"""Who executes the tasks of a run."""
