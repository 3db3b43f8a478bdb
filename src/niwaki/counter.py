"""Randomness without generators: a number is a hash of what it is for.

Uniform numbers come from ``(seed, step, name, flat index)`` alone, so that replicas agree without talking, shards agree with the
whole, and there is no generator state to save.
"""

import hashlib

import torch
from torch import Tensor

_MULTIPLIERS = (-4658895280553007687, -7723592293110705685)  # 0xbf58476d1ce4e5b9, 0x94d049bb133111eb as signed 64-bit


def key(seed: int, step: int, name: str) -> int:
    """Return a signed 64-bit key for one stream of random numbers."""
    digest = hashlib.blake2b(f"{seed}\0{step}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniform(stream: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Return float64 numbers in [0, 1) for the flat indices ``start .. start + count - 1`` of a stream.

    The hash is the finalizer of SplitMix64 (Steele, Lea, Flood 2014) over ``stream + index * golden ratio``; the top 53 bits are kept.
    """
    x = torch.arange(start, start + count, dtype=torch.int64, device=device).mul_(-7046029254386353131).add_(stream)
    for shift, multiplier in ((30, _MULTIPLIERS[0]), (27, _MULTIPLIERS[1])):
        x.bitwise_xor_((x >> shift) & ((1 << (64 - shift)) - 1)).mul_(multiplier)
    x.bitwise_xor_((x >> 31) & ((1 << 33) - 1))
    return ((x >> 11) & ((1 << 53) - 1)).to(torch.float64).mul_(2.0**-53)


def normal(stream: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Return float64 standard normal numbers for the flat indices ``start .. start + count - 1`` of a stream.

    The quantile function of the normal distribution at the uniform numbers, moved by half their spacing so that none is 0.
    """
    numbers: Tensor = torch.special.ndtri(uniform(stream, start, count, device).add_(2.0**-54))
    return numbers
