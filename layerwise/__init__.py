"""layerwise trains deep networks that do not fit on the GPU, one gradient-isolated module at a time."""
