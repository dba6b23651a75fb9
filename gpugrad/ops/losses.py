"""Losses: how far predictions are from their targets."""

__all__: list[str] = []
