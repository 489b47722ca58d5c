"""What pruning may cost traffic that it cannot help."""

# Prompts without pictures may lose this share of a server's token capacity, so that pictures gain
# the rest.
TEXT_CAPACITY_LOSS = 1 / 8
