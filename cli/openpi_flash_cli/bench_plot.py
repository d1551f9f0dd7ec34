"""Draws the figures of `openpi-flash bench model`: a bar for each batch of each arm, and a line where its limit is."""

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH, ROW, MARGIN, LABEL, FIGURES = 1100, 26, 24, 250, 210
COLOURS = ("#3b6fb6", "#d9822b", "#4b9b5f", "#a64d79", "#7a6a53", "#5b8f99", "#999999")


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes a picture of p50 (bar), p99 (thin line) and limit (mark); the format is that of the path's ending."""
    bars = []
    for colour, (name, arm) in zip(_cycle(len(report["arms"])), report["arms"].items(), strict=True):
        bars += [(f"{name}, batch {size}", times, colour) for size, times in arm.get("batches", {}).items()]
        parts = [(key, arm[key]) for key in arm if key.endswith(("_token", "_tokens"))]
        bars += [(f"{name}, {key.replace('_', ' ')}", times, colour) for key, times in parts]
    font, large = ImageFont.load_default(15), ImageFont.load_default(19)
    image = Image.new("RGB", (WIDTH, 2 * MARGIN + ROW * (len(bars) + 3)), "white")
    canvas = ImageDraw.Draw(image)
    job = report["job"]
    names = [arm["device_name"] for arm in report["arms"].values() if "device_name" in arm]
    canvas.text((MARGIN, MARGIN), f"{job['size']} pi0.5 on {(names or [job['device']])[0]}", "black", large)
    longest = max((times["p99_ms"] for _, times, _ in bars), default=1.0)
    room = WIDTH - 2 * MARGIN - LABEL - FIGURES
    for i, (label, times, colour) in enumerate(bars):
        top = MARGIN + ROW * (i + 2)
        left, middle, bottom = MARGIN + LABEL, top + ROW // 2 - 2, top + ROW - 6
        canvas.text((MARGIN, top), label, "black", font)
        canvas.rectangle((left, top, left + max(1, room * times["p50_ms"] / longest), bottom), colour)
        canvas.line((left, middle, left + room * times["p99_ms"] / longest, middle), "#444444", 1)
        figures = f"{times['p50_ms']:.1f} ms"
        if "limit_ms" in times:
            limit = left + room * times["limit_ms"] / longest
            canvas.line((limit, top - 3, limit, bottom + 3), "red", 2)
            figures += f" (limit {times['limit_ms']:.2f})"
        canvas.text((WIDTH - MARGIN - FIGURES + 12, top), figures, "black", font)
    legend = "bar: p50; line: p99; red: the least that the measured copy and matmul rates allow"
    canvas.text((MARGIN, MARGIN + ROW * (len(bars) + 2)), legend, "#444444", font)
    image.save(path)


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]
