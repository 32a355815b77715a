"""Text from models of language: the likeliest tokens, drawn ones, or the best of several beams."""

from jtl.generation.defaults import defaults
from jtl.generation.generate import generate
from jtl.generation.settings import Generated

__all__ = ["Generated", "defaults", "generate"]
