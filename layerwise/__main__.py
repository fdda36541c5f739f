"""`python -m layerwise`."""

from layerwise.commands import main

if __name__ == "__main__":
    main()
