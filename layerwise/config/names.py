"""What --data and --net may name."""

RECORDINGS, PICTURES, ARRAYS = ("demo", "speech", "fsdd", "librispeech"), ("images", "stl10", "cifar10"), ("npy", "h5")
DATA_KINDS = (*RECORDINGS, *PICTURES, *ARRAYS)
"""What may stand before the colon of --data."""

PAPER_NETWORKS = ("speech", "vision")

TORCHVISION = "torchvision:"
"""What stands before the name of one of torchvision's networks."""

FUNCTION = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"
"""How a function of the user's is named: package.module:function."""

OWN = "own"
"""The name of data and networks that are given as objects, in Python."""
