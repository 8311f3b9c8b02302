"""The table on the screen."""

from __future__ import annotations

from peers import PEERS

COLUMNS = ("ours", *(peer.name for peer in PEERS))
Row = dict[str, object]


def show(cell: Row | None, ours: bool) -> str:
    if cell is None:
        return "·"
    if "failed" in cell:
        return "failed"
    text = f"{cell['value']:.3g}" if cell["value"] >= 10 else f"{cell['value']:.2f}"
    if cell.get("runs", 0) > 2 and ours:
        text += f" ({cell['low']:.2f}–{cell['high']:.2f})"
    return text + (f", {100 * cell['accuracy']:.1f} % stand" if "accuracy" in cell else "")


def print_table(rows: list[Row]) -> None:
    lines = [["", *COLUMNS, "goal"]]
    for row in rows:
        verdict = f"{row['goal']} {'met' if row['met'] else 'MISSED'}" if "goal" in row else ""
        unit = f" [{row['unit']}]" if "unit" in row else ""
        lines.append([row["what"] + unit, *(show(row["cells"].get(c), c == "ours") for c in COLUMNS),
                      verdict])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))
    print()
    for row in rows:
        if "notes" in row:
            print(f"{row['what']}: {row['notes']}.")
        for name, cell in row["cells"].items():
            if "failed" in cell:
                print(f"  {name} failed: {cell['failed'].splitlines()[0]}")
