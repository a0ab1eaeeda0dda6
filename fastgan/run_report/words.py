"""Numbers, durations and times as a reader wants them."""

import math
from datetime import UTC, datetime


def number(value: float | None) -> str:
    """Four digits; whole above a thousand; a dash for what is not known."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def thousands(kimg: float) -> str:
    """Thousands of images: 40.064 -> 40.1."""
    return f"{kimg:,.1f}" if kimg < 1e12 else f"{kimg:.4g}"


def duration(seconds: float) -> str:
    """The two largest units: 3 d 4 h, 2 h 05 min, 3 min 20 s, 20 s."""
    s = round(seconds)
    if s >= 86_400:
        return f"{s // 86_400:,} d {s % 86_400 // 3600} h"
    if s >= 3600:
        return f"{s // 3600} h {s % 3600 // 60:02} min"
    return f"{s // 60} min {s % 60:02} s" if s >= 60 else f"{s} s"


def moment(timestamp: float) -> str:
    """Seconds since 1970 (before the year 10000) as 2026-01-31 12:00 UTC."""
    return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%d %H:%M UTC")
