"""The algorithms, one file each. `base.py` defines what an algorithm is, `registry.py` lists them by name.

A config holds its algorithm but is read without torch, so torch is imported only where it is needed.
"""
