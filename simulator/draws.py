"""Randomness by name: independent streams of one seed, so that nothing that is drawn depends on what else was."""

from hashlib import sha256

from numpy.random import PCG64, Generator, SeedSequence


class Draws:
    """The streams of one seed.

    A stream depends on the seed and its name alone: not on the machine, not on which others were asked for, and not on
    who decides in the world. So every policy meets the same requests and the same faults (mathematics.md, part D).
    """

    def __init__(self, seed: int) -> None:
        assert seed >= 0, "numpy takes no negative seed"
        self.seed = seed

    def stream(self, name: str) -> Generator:
        """The stream of that name, from its beginning every time.

        These are children as `SeedSequence.spawn` makes them, under the words of a hash instead of a running number.
        """
        digest = sha256(name.encode()).digest()
        words = tuple(int.from_bytes(digest[start : start + 4], "big") for start in range(0, len(digest), 4))
        return Generator(PCG64(SeedSequence(self.seed, spawn_key=words)))
