"""Encodings of sparse tensors, and the container file that holds them."""

from niwaki.formats.container import Loaded, load, save

__all__ = ["Loaded", "load", "save"]
