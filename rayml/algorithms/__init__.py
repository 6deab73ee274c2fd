"""The algorithms: one file each. `base.py` says what an algorithm is, `registry.py` which there are.

A config is read without torch, and holds its algorithm: so these modules import torch only where they need it.
"""
