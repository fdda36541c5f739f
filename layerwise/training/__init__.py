"""Training one stage, caching its outputs, and the state of a run."""
