"""A trained encoder at work: loaded, given new recordings and pictures, handed over to other programs."""
