"""Rows of figures as text, and predictions as a CSV file."""

import csv


def table(rows):
    """Dicts with the same keys → the lines of a table, its columns aligned."""
    cells = [list(rows[0])]
    for row in rows:
        cells.append([f"{c:.5g}" if isinstance(c, float) else str(c) for c in row.values()])
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  ".join(c.rjust(w) for c, w in zip(line, widths)) for line in cells]


def write_predictions(path, rows, samples, classes):
    """A line a video: its path, its label, then pairs of a likely class and its score.

    rows: evaluate.predict's; samples: (path, label) pairs; classes: names.
    """
    header = ["video", "label"]
    for i in range(1, 1 + min(5, len(classes))):
        header += [f"class{i}", f"score{i}"]
    with open(path, "w", newline="", errors="surrogateescape") as out:
        lines = csv.writer(out, lineterminator="\n")
        lines.writerow(header)
        for row in rows:
            cells = [samples[row.index][0], classes[row.label]]
            for c, score in zip(row.classes, row.scores):
                cells += [classes[c], f"{score:.6f}"]
            lines.writerow(cells)
