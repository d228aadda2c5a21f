"""Random draws that are the same on every machine and with every version of NumPy."""

import hashlib

import numpy as np


def generator(*key):
    """A generator of its own for each (seed, what it is for, …): the same on every machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def shuffled(rng, items):
    """The items in random order."""
    # By sorting random numbers: the stream of .random() is stable between NumPy's versions,
    # .permutation() need not be.
    return items[np.argsort(rng.random(len(items)), kind="stable")]
