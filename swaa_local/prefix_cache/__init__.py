"""Texts that were read stay read: what the KV cache held of them, kept on disk and found again by their tokens.

Knows files, tokens and bytes; what the bytes mean, the engine knows.
"""
