"""Tables of a bench run, and the record that is kept of it.

A bench leaves its figures in `extra_info`: `table` names the table, `shape` the row's problem,
`method` the row, `seconds` the smallest time. Ratios are made here, from rows of the same run.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# A row during which other programs took more of the processors than this is called disturbed.
QUIET = 0.05


def add_ratios(rows: Iterable[Row]) -> None:
    """Give each of pyquiet's rows `best_baseline` and `ratios`: baseline's seconds over its own.

    Its own time in another dtype, the method "pyquiet DTYPE", is no baseline: that ratio is `over_DTYPE`.
    """
    rows = list(rows)
    for ours in rows:
        if ours.get("method") != "pyquiet":
            continue
        same = [r for r in rows if (r["table"], r.get("shape")) == (ours["table"], ours["shape"])]
        ratios = {r["method"]: r["seconds"] / ours["seconds"] for r in same if r is not ours}
        for own in [method for method in ratios if method.startswith("pyquiet ")]:
            ours[own.replace("pyquiet ", "over_")] = ratios.pop(own)
        if ratios:
            ours["ratios"] = ratios
            ours["best_baseline"] = min(ratios, key=ratios.__getitem__)


def lines(rows: list[Row]) -> list[str]:
    """Return the printed tables: a line for each of pyquiet's rows, and for those beside none."""
    add_ratios(rows)
    compared = {(row["table"], row["shape"]) for row in rows if row.get("method") == "pyquiet"}
    printed: list[str] = []
    for table in dict.fromkeys(row["table"] for row in rows):
        printed += ["", table]
        for row in rows:
            if row["table"] != table:
                continue
            if row.get("method") == "pyquiet":
                printed.append(f"  {row['shape']:<14}" + comparison(row))
                printed += memory(row, rows)
            elif (table, row.get("shape")) not in compared:
                printed.append("  " + figures(row))
    return printed


def disturbance(rows: list[Row]) -> str:
    """Return how much of the run other programs had a part in."""
    shares = [row["others"] for row in rows if "others" in row]
    disturbed = sum(share > QUIET for share in shares)
    if not disturbed:
        return f"quiet: other programs took under {QUIET:.0%} of the processors in every row"
    return (
        f"DISTURBED: in {disturbed} of {len(shares)} rows other programs took over {QUIET:.0%} of "
        f"the processors, up to {max(shares):.0%}; run again on a quiet machine"
    )


def comparison(row: Row) -> str:
    """Return our time, our rates, and by how much each baseline is slower, the best one first."""
    text = f"{row['seconds'] * 1e3:9.3f} ms"
    if row.get("gflops"):
        text += f" {row['gflops']:6.1f} GFLOP/s"
    if row.get("of_peak"):
        text += f" {row['of_peak']:5.1%} of peak"
    if row.get("of_copy"):
        text += f" {row['moved_gbs']:6.0f} GB/s {row['of_copy']:5.1%} of copy"
    if row.get("read_gbs"):
        text += f" {row['read_gbs']:6.1f} GB/s"
    if row.get("others", 0) > QUIET:
        text += " (disturbed)"
    ratios = sorted(row.get("ratios", {}).items(), key=lambda item: item[1])
    text += " | " + ", ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios)
    if "over_float32" in row:
        text += f" | over our float32 {row['over_float32']:.2f}x"
    return text


def memory(ours: Row, rows: list[Row]) -> list[str]:
    """Return a line each of what the methods of the row's problem take at their peak, and save, where it is known."""
    same = [row for row in rows if (row["table"], row.get("shape")) == (ours["table"], ours["shape"])]
    printed = []
    for word in ("peak", "saved"):
        known = sorted((row[f"{word}_mib"], row["method"]) for row in same if row.get(f"{word}_mib") is not None)
        if known:
            printed.append(" " * 16 + f"{word} MiB: " + ", ".join(f"{method} {mib:.0f}" for mib, method in known))
    return printed


def figures(row: Row) -> str:
    """Return every figure of a row that is compared with nothing, by name."""
    kept = {k: v for k, v in row.items() if k != "table"}
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in kept.items())


def save(path: Path, record: dict[str, Any]) -> None:
    """Write the record as JSON; a kill leaves the old file or the new one, never half of it."""
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(unfinished, path)
