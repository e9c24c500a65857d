"""Lossless coding: integer codes to bytes and back, nothing lost and nothing padded inside."""
