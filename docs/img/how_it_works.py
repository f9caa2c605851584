"""Draws docs/img/how_it_works.svg, the README's figure: python docs/img/how_it_works.py"""

from pathlib import Path

CELL, GAP, LEFT, WIDTH = 26, 4, 150, 680
COLOURS = ["#4c78a8", "#f58518", "#54a24b", "#b279a2"]
BUCKETS = [2, 0, 1, 2, 3, 1, 0, 2, 1, 3, 0, 1, 2, 0, 3, 1]
CHUNK = 4


def row(y: int, label: str, positions: list[int]) -> str:
    cells = []
    for slot, position in enumerate(positions):
        x = LEFT + slot * (CELL + GAP)
        fill = COLOURS[BUCKETS[position]]
        cells.append(
            f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" rx="4" fill="{fill}"/>'
            f'<text x="{x + CELL / 2}" y="{y + 18}" class="n">{position}</text>'
        )
    return f'<text x="10" y="{y + 18}" class="l">{label}</text>' + "".join(cells)


def main() -> None:
    natural = list(range(len(BUCKETS)))
    ordered = sorted(natural, key=lambda position: (BUCKETS[position], position))
    step = CELL + GAP
    arrows = "".join(
        f'<line x1="{LEFT + p * step + CELL / 2}" y1="58" '
        f'x2="{LEFT + s * step + CELL / 2}" y2="98" '
        f'stroke="{COLOURS[BUCKETS[p]]}" stroke-width="1.5"/>'
        for s, p in enumerate(ordered)
    )
    chunks, windows = "", ""
    for chunk in range(len(BUCKETS) // CHUNK):
        x = LEFT + chunk * CHUNK * step - GAP / 2
        width = CHUNK * step
        chunks += (
            f'<rect x="{x}" y="96" width="{width}" height="{CELL + 8}" rx="6" class="c"/>'
            f'<text x="{x + width / 2}" y="148" class="n d">chunk {chunk}</text>'
        )
    query = 2
    for key, label in ((query - 1, "look back"), (query, "own chunk")):
        x = LEFT + key * CHUNK * step
        windows += (
            f'<rect x="{x}" y="186" width="{CHUNK * step - GAP}" height="96" rx="4" class="w"/>'
            f'<text x="{x + CHUNK * step / 2 - 2}" y="300" class="n d">keys: {label}</text>'
        )
    for r in range(CHUNK):
        windows += (
            f'<text x="{LEFT + (query - 1) * CHUNK * step - 8}" y="{204 + r * 23}" class="n d" '
            f'style="text-anchor:end">query {ordered[query * CHUNK + r]}</text>'
        )
        for c in range(2 * CHUNK):
            i, j = ordered[query * CHUNK + r], ordered[(query - 1) * CHUNK + c]
            x, y = LEFT + (query - 1) * CHUNK * step + c * step, 188 + r * 23
            on = "k" if j < i else "o"
            windows += f'<rect x="{x + 3}" y="{y + 2}" width="20" height="18" rx="3" class="{on}"/>'
    style = (
        "text{font-family:sans-serif;font-size:13px}.l{font-weight:600;fill:#555}"
        ".n{fill:#fff;text-anchor:middle;font-size:12px}.d{fill:#777}"
        ".c{fill:none;stroke:#888;stroke-dasharray:4 3}.w{fill:#888;fill-opacity:.08}"
        ".k{fill:#4c78a8}.o{fill:#888;fill-opacity:.25}"
    )
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 312" width="{WIDTH}">'
        f"<style>{style}</style>"
        + row(30, "1 hash", natural)
        + arrows
        + chunks
        + row(100, "2 sort, 3 chunk", ordered)
        + '<text x="10" y="226" class="l">4 attend</text>'
        + f'<text x="10" y="244" class="d">chunk {query}, causal</text>'
        + windows
        + "</svg>\n"
    )
    Path(__file__).with_suffix(".svg").write_text(svg)


if __name__ == "__main__":
    main()
