"""Runs the command line from a checkout: `python cli.py run` is `layerwise run`."""

from layerwise.commands import main

if __name__ == "__main__":
    main()
