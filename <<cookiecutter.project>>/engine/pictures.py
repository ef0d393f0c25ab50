"""Draws the pictures of a run or an evaluation. Needs no Keras."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vegab.execution import printable
from vegab.files import replacing

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

NUM_EXAMPLES = 16  # of which an evaluation keeps a picture
NUM_SHOWN = 8  # of them, where each has several pictures
MOST_NAMED = 20  # classes; more would not be legible
MOST_POINTS = 10_000
LONGEST_NAME = 24  # characters
LONGEST_WORD = 15  # characters, above a small picture
TILE, A_LINE = 1.3, 4  # inches of a small picture, and how many stand in a line


def draw_learning_curve(
    run: Path, history: Sequence[Mapping[str, Any]], best_epoch: int | None
) -> None:
    """Draw `learning_curve.png`: loss and first metric; the best epoch (from 0) is marked."""
    from matplotlib.ticker import MaxNLocator

    columns = [key for key in history[0] if key not in ("epoch", "step", "learning_rate")]
    metrics = [key for key in columns if not key.startswith("val_")][:2]
    if not metrics:
        return
    figure = new_figure(width=4.2 * len(metrics), height=3.2)
    epochs = [row["epoch"] + 1 for row in history]
    # Told apart by line style as well as by colour, for print and for the colour-blind.
    looks = (("", "#0072B2", "-", "train"), ("val_", "#D55E00", "--", "validation"))
    for index, metric in enumerate(metrics, start=1):
        axes = figure.add_subplot(1, len(metrics), index)
        for prefix, color, line, label in looks:
            if (key := prefix + metric) not in columns:
                continue
            values = [row.get(key, float("nan")) for row in history]
            axes.plot(epochs, values, color=color, linestyle=line, marker=".", label=label)
            if best_epoch is not None:
                best = values[best_epoch]
                axes.plot(best_epoch + 1, best, "o", color=color, markersize=8, fillstyle="none")
        if best_epoch is not None:
            name = f"best epoch ({best_epoch + 1})"
            axes.axvline(best_epoch + 1, color="0.6", linewidth=1, zorder=0, label=name)
        axes.set_title(metric, fontsize=10, parse_math=False)
        axes.set_xlabel("epoch")
        axes.ticklabel_format(axis="y", scilimits=(-4, 5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.spines[["top", "right"]].set_visible(False)
    each = [axes.get_legend_handles_labels() for axes in figure.axes]
    names = {name: line for lines, labels in each for line, name in zip(lines, labels, strict=True)}
    # Below, for within the axes it may lie on a curve.
    figure.legend(names.values(), names, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(run.name, fontsize=11, parse_math=False)
    save_figure(figure, run / "learning_curve.png")


def draw_confusion_matrix(
    matrix: "np.ndarray", path: Path, title: str, class_names: Sequence[Any]
) -> None:
    """Draw counts of labels (rows) against predictions (columns) into a PNG file."""
    num_classes = len(matrix)
    figure = new_figure(width=5.2, height=4.8)
    axes = figure.add_subplot()
    shares = matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if num_classes <= MOST_NAMED:
        for label, prediction in zip(*matrix.nonzero(), strict=True):
            color = "white" if shares[label, prediction] > 0.5 else "black"
            count = str(matrix[label, prediction])
            axes.text(prediction, label, count, ha="center", va="center", fontsize=8, color=color)
        names = [str(name)[:LONGEST_NAME] for name in class_names]
        rotation = 90 if max(map(len, names)) > 2 else 0
        axes.set_xticks(range(num_classes), names, rotation=rotation, parse_math=False)
        axes.set_yticks(range(num_classes), names, parse_math=False)
    axes.set(xlabel="prediction", ylabel="label")
    axes.set_title(title, fontsize=11, parse_math=False)
    figure.colorbar(image, ax=axes, label="share of the label", shrink=0.8)
    save_figure(figure, path)


def draw_predicted_against_true(
    pairs: Mapping[str, tuple["np.ndarray", "np.ndarray"]], path: Path, title: str
) -> None:
    """Draw a panel for each name: true values on the x axis, predictions on the y axis."""
    import numpy as np

    figure = new_figure(width=3.6 * len(pairs), height=3.9)
    panels = figure.subplots(1, len(pairs), squeeze=False)[0]
    for axes, (name, (true, predicted)) in zip(panels, pairs.items(), strict=True):
        finite = np.isfinite(true) & np.isfinite(predicted)
        points = np.stack([true[finite], predicted[finite]])[:, :: len(true) // MOST_POINTS + 1]
        axes.plot(*points, ".", color="#0072B2", markersize=4, markeredgewidth=0, alpha=0.5)
        if points.size:
            ends = [points.min(), points.max()]
            axes.plot(ends, ends, color="0.6", linewidth=1, zorder=0)
        axes.set(xlabel="true", ylabel="predicted", aspect="equal")
        axes.set_title(name if len(pairs) > 1 else "", fontsize=10, parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11, parse_math=False)
    save_figure(figure, path)


def draw_examples(
    rows: Mapping[str, "np.ndarray"], path: Path, title: str, class_names: Sequence[Any] = ()
) -> None:
    """Draw the first pictures of a set side by side, a row for each name, into a PNG file.

    Pictures have the shape (num_images, height, width, 1 or 3), or are classes that `class_names`
    names, without the last. A last row that can be compared takes the scale of the one above."""
    from matplotlib import colormaps

    num_images = min(NUM_SHOWN, *map(len, rows.values()))
    width = 1.2 * num_images + 0.5 + 1.4 * bool(class_names)
    figure = new_figure(width, height=1.2 * len(rows) + 0.6)
    panels = figure.subplots(len(rows), num_images, squeeze=False)
    low, span, form = 0.0, 1.0, None
    for line, (name, images) in zip(panels, rows.items(), strict=True):
        before, form = form, (images.dtype.kind, images.shape[3:])
        if line is not panels[-1] or form != before:
            low = float(images.min())
            span = float(images.max()) - low or 1
        for axes, image in zip(line, images, strict=False):
            if image.ndim == 2:
                colors = colormaps["viridis"].resampled(len(class_names))
                shown = axes.imshow(image, colors, vmin=-0.5, vmax=len(class_names) - 0.5)
            else:
                axes.imshow(((image - low) / span).clip(0, 1), "gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
    figure.suptitle(title, fontsize=11, parse_math=False)
    if 0 < len(class_names) <= MOST_NAMED:
        bar = figure.colorbar(shown, ax=panels, ticks=range(len(class_names)))
        bar.set_ticklabels([str(name)[:LONGEST_NAME] for name in class_names], parse_math=False)
    save_figure(figure, path)


def draw_through_training(folder: Path) -> None:
    """Draw the pictures NAME_STEP.png of a folder side by side in order of steps, as NAME.png: at
    most eight of each name, the first and the last among them."""
    from matplotlib.image import imread

    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*_[0-9]*.png")):
        found.setdefault(path.stem.rpartition("_")[0], []).append(path)
    for name, paths in found.items():
        number = min(NUM_SHOWN, len(paths))
        chosen = [paths[place * (len(paths) - 1) // max(number - 1, 1)] for place in range(number)]
        figure = new_figure(width=2.2 * number, height=2.6)
        panels = figure.subplots(1, number, squeeze=False)[0]
        for axes, path in zip(panels, chosen, strict=True):
            axes.imshow(imread(path), "gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.set_title(f"step {int(path.stem.rpartition('_')[2])}", fontsize=10)
        figure.suptitle(name, fontsize=11, parse_math=False)
        save_figure(figure, folder / f"{name}.png")


def draw_classified(
    images: "np.ndarray",
    classes: Sequence["np.ndarray"],
    class_names: Sequence[Any],
    path: Path,
    title: str,
) -> None:
    """Draw pictures with `classes`: labels, predictions, probabilities; mistakes first."""
    import numpy as np
    from matplotlib.figure import Figure

    label, prediction, probability = (array[: len(images)] for array in classes)
    is_right = label == prediction
    order = np.lexsort((np.where(is_right, 0, -probability), is_right))[:NUM_EXAMPLES]
    names = {n: str(name)[:LONGEST_WORD] for n, name in enumerate(class_names)}
    low, high = float(images.min()), float(images.max())
    tall = TILE * min(max(images.shape[1] / images.shape[2], 0.3), 3)
    width, step = A_LINE * (TILE + 0.1) + 0.1, tall + 0.45
    height = step * -(-len(order) // A_LINE) + 0.5
    # Placed by hand: margins that are looked for take longer than all the drawing.
    figure = Figure(figsize=(width, height))
    told = f"{title}\nlabel, → prediction if it is wrong, probability"
    figure.text(0.1 / width, 1 - 0.4 / height, told, fontsize=9, parse_math=False)
    for place, index in enumerate(order):
        line, column = divmod(place, A_LINE)
        left, bottom = 0.1 + column * (TILE + 0.1), height - 0.45 - (line + 1) * step
        axes = figure.add_axes((left / width, bottom / height, TILE / width, tall / height))
        image = (images[index].astype(np.float64) - low) / ((high - low) or 1)
        axes.imshow(image.clip(0, 1), "gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        true, taken = (names.get(int(n[index]), str(n[index])) for n in (label, prediction))
        share, color = f"{probability[index]:.2f}", "black" if is_right[index] else "#B34700"
        text = f"{true}\n{share}" if is_right[index] else f"{true}\n→ {taken} {share}"
        axes.set_title(text, fontsize=8, pad=2, color=color, parse_math=False)
        axes.spines[:].set(color=color, linewidth=0.5 if is_right[index] else 1.5)
    save_figure(figure, path, dpi=100, compress_level=9)  # a report of many runs has them all


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure, in inches, that needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: Path, dpi: int = 150, compress_level: int = 1) -> None:
    """Write a PNG in one step. The default level takes half the time, and a tenth more bytes."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):  # the name of a run may be no UTF-8
        text.set(text="\n".join(map(printable, text.get_text().split("\n"))))
    with replacing(path, sync=False) as temporary:
        options = {"compress_level": compress_level}
        figure.savefig(temporary, format="png", dpi=dpi, pil_kwargs=options)
