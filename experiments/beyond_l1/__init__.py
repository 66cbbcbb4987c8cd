"""Sparse coding of natural images under several penalties."""
