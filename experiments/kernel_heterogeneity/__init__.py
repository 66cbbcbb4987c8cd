"""Convolutional sparse codes of photographs under dictionaries of one or many bandwidths."""
