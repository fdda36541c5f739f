"""The device budget: parse it, measure against it, predict what fits."""
