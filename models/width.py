"""How a widen factor changes a channel count."""


def widen(channels: int, factor: float) -> int:
    """Multiply a channel count by a real factor, rounded, never below 1."""
    return max(1, round(channels * factor))
