"""Placeholder, replaced within the hour."""


class Sharded:
    rank: int
    workers: int
    done: int

    def __init__(self, *_):
        raise NotImplementedError
