"""One TOML file of defaults per experiment; `layerwise.config` reads them."""
