"""What traffic without pictures may lose, so that requests with pictures gain memory."""

from fractions import Fraction

# of the tokens that a server's KV cache holds for text alone
TEXT_CAPACITY_LOSS = Fraction(1, 8)
