"""The figures of the report: sizes, axes, looks, the numbers in them."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib.colors
import matplotlib.figure
import numpy as np
from PIL import Image
from small import call

import evaluate
from reporting import figures, tables

ROOT = Path(__file__).resolve().parent.parent
NAMES = {"probe": "linear probe", "lora": "LoRA", "full": "end-to-end"}


def test_an_equal_report_is_equal_byte_by_byte(study, tmp_path):
    root, out = study
    assert call(evaluate, root, "--out", tmp_path, "--paper", "--replicates", 200) == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / name).read_bytes(), name
    assert {
        f"{kind}_midog2022.{end}"
        for kind in ("scaling", "cross", "roc_pr", "reliability", "leak")
        for end in ("png", "svg")
    } <= set(names)
    assert not [name for name in names if name.endswith(".tmp")]


@figures.styled
def test_a_legend_of_long_names_is_not_cut_off():
    names = [f"dinov2-s soft patch center 112px crop64 {number}" for number in range(4)]
    figure = matplotlib.figure.Figure(figsize=(figures.WIDTH, 4), layout="constrained")
    lines = figure.subplots().plot(np.zeros((2, 4)))
    figures._legend(figure, lines, names)
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width


def test_figures_are_a_column_wide_not_empty_and_valid(study):
    _, out = study
    for path in out.glob("*_midog2022.png"):
        image = Image.open(path)
        assert image.size[0] == round(figures.WIDTH * 300) and image.size[1] < 9.2 * 300, (
            path
        )  # a page is 9 inches
        grey = np.asarray(image.convert("L"))
        assert 0.01 < (grey < 128).mean() < 0.5 and (grey[0] == 255).all(), path
        root = ElementTree.parse(path.with_suffix(".svg")).getroot()
        assert root.tag.endswith("svg") and root.get("width") == f"{figures.WIDTH * 72:g}pt"


def texts(figure):
    return [
        text.get_text()
        for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))
        if text.get_text()
    ]


def many(
    models=(
        "h-optimus-0",
        "phikon",
        "prov-gigapath",
        "resnet50",
        "uni",
        "virchow",
        "virchow2",
        "vit-b",
        "vit-h",
        "uni2-h",
    ),
):
    rng = np.random.default_rng(0)
    y = rng.random(300) < 0.4
    return {
        (method, model): [
            (y, np.clip(0.4 * rng.random(300) + 0.3 * y + 0.2, 0, 1)) for _ in range(2)
        ]
        for method in NAMES.values()
        for model in models
    }


def test_every_axis_has_a_label_and_every_line_a_look_of_its_own():
    curves = many()
    lines = {
        method: {model: {f: [0.7, 0.8] for f in (0.001, 0.01, 0.1, 1.0)} for _, model in curves}
        for method in NAMES.values()
    }
    domains = [
        "human breast cancer",
        "canine lung cancer",
        "canine lymphoma",
        "human melanoma",
        "A",
    ]
    matrices = {
        f"{model} {method}": {(a, b): 0.8 for a in domains for b in domains}
        for method, model in curves
    }
    drawn = [
        figures.scaling(lines),
        figures.roc_pr(curves),
        figures.reliability(curves, "mitotic figure"),
        figures.cross_domain(matrices, domains),
        figures.leak([("uni LoRA, 100%", 0.8, 0.9)]),
    ]
    for figure in drawn:
        axes = [ax for ax in figure.axes if ax.axison]
        below = {ax.get_position().x0 for ax in axes if ax.get_xlabel()}
        left = {ax.get_position().y0 for ax in axes if ax.get_ylabel() or ax.get_yticklabels()}
        assert {ax.get_position().x0 for ax in axes} <= below and {
            ax.get_position().y0 for ax in axes
        } <= left
        # No two lines of a panel look the same in grey: marker, dashes and filling tell them apart.
        for ax in axes:
            looks = [
                (
                    line.get_marker(),
                    str(line.get_linestyle()),
                    str(line._dash_pattern),
                    str(line.get_markerfacecolor() == "white"),
                )
                for line in ax.lines
                if line.get_marker() != "None"
            ]
            assert figure is drawn[4] or len(looks) == len(set(looks))
    assert list(dict.fromkeys(text for text in texts(drawn[0]) if text.endswith("%"))) == [
        "0.1%",
        "1%",
        "10%",
        "100%",
    ]
    assert {"share of the training pool", "AUROC"} <= set(texts(drawn[0]))
    assert {"1 − specificity", "sensitivity", "precision"} <= set(texts(drawn[1]))
    assert {"AUROC", "HBC", "CLC", "CL", "HM", "A"} <= set(texts(drawn[3]))
    assert "human breast cancer" not in texts(drawn[3])


def test_neighbouring_lines_differ_in_grey():
    def grey(colour):
        return np.dot(matplotlib.colors.to_rgb(colour), (0.299, 0.587, 0.114))

    looks = [figures.look(i) for i in range(10)]
    assert len({(look["marker"], look["dashes"]) for look in looks}) == 10
    assert all(grey(look["color"]) < 0.72 for look in looks)  # none fades on white paper


def test_numbers_of_the_matrix_are_the_means_and_read_on_their_grey():
    domains = ["A", "B"]
    matrix = {("A", "A"): 0.987, ("A", "B"): 0.5, ("B", "A"): 1.0}
    ax = figures.cross_domain({"uni LoRA": matrix}, domains).axes[0]
    assert {tuple(map(int, text.get_position())): text.get_text() for text in ax.texts} == {
        (0, 0): ".99",
        (1, 0): ".50",
        (0, 1): "1.0",
        (1, 1): "–",
    }  # (tested on, trained on)
    # A row per domain of training alone.
    few = figures.cross_domain({"uni LoRA": {("B", "A"): 0.7, ("B", "B"): 0.8}}, domains).axes[0]
    assert [text.get_text() for text in few.texts] == [".70", ".80"]
    assert [label.get_text() for label in few.get_yticklabels()] == ["B"]
    image = ax.images[0]
    greys = image.cmap(image.norm(image.get_array().compressed()))[:, :3].mean(1)
    assert greys.min() > 0.45  # black numbers on it are read


def test_names_on_axes_are_short_and_differ():
    names = [
        "human breast cancer",
        "canine lung cancer",
        "canine lymphoma",
        "canine cutaneous mast cell tumor",
        "human neuroendocrine tumor",
        "canine soft tissue sarcoma",
        "human melanoma",
        "canine liver cancer",
        "A",
        "CLC",
        "adenocarcinoma",
        "adenocarcinoid",
        "Hamamatsu_XR",
        "Hamamatsu_S360",
    ]
    found = figures.short_names(names)
    assert set(found) == set(names) and len(set(found.values())) == len(names)
    assert all(len(short) <= 8 for short in found.values())
    assert (found["A"], found["CLC"], found["human breast cancer"]) == ("A", "CLC", "HBC")
    assert figures.short_names(["B", "A"]) == {"A": "A", "B": "B"}
    assert tables.legend("mine", ["human melanoma", "A"]) == " HM: human melanoma."
    assert (
        tables.legend("midog2022", ["A", "D"])
        == " A: canine cutaneous mast cell tumour, D: human neuroendocrine tumour."
    )
    assert tables.legend("mine", ["A", "B"]) == ""


def test_importing_and_drawing_changes_no_setting_of_matplotlib():
    code = (
        "import matplotlib; before = list(dict.items(matplotlib.rcParams)); import evaluate\n"
        "from reporting import figures; figures.images(figures.leak([('a', 0.8, 0.9)]))\n"
        "assert list(dict.items(matplotlib.rcParams)) == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_a_dollar_in_a_name_starts_no_formula():
    names = [r"$\q$", "a_{b", "$x$", "x^2 & <b>", "\x1b[31m$"]
    cells = {(a, b): 0.7 for a in names for b in names}
    figure = figures.cross_domain({r"uni $\q$": cells}, names)
    pictures = figures.images(figure)
    assert r"uni $\q$" in texts(figure) and "$x$" in texts(figure)
    assert all(len(content) > 1000 for content in pictures.values())
    ElementTree.fromstring(pictures["svg"])
    for drawn in (
        figures.scaling({r"$\q$": {"$_": {0.1: [0.7], 1.0: [0.8]}}}),
        figures.leak([(r"$\q$", 0.7, 0.8)]),
    ):
        assert figures.images(drawn)["png"]


def test_training_curves_mark_the_epoch_that_was_kept(tmp_path):
    def log(shift):
        epoch = np.arange(1.0, 7)
        return {
            "epoch": epoch,
            "train_loss": 1 / epoch,
            "val_loss": (epoch - 4) ** 2 + shift,
            "val_auroc": 0.5 + epoch / 20,
        }

    figure = figures.training({"uni LoRA": [log(1), log(2)], "uni end-to-end": [log(3)]})
    losses, ranking = figure.axes
    marked = [line for line in losses.lines if line.get_marker() not in ("None", None)]
    assert len(marked) == 3 and len(losses.lines) == 6 and len(ranking.lines) == 3
    assert all(line.get_markevery() == [3] for line in marked)  # epoch 4
    assert {"uni LoRA", "uni end-to-end", "thin: training loss"} <= set(texts(figure))
    rows = zip(*log(0).values())
    lines = [",".join(map(str, row)) for row in rows]
    (tmp_path / "log.csv").write_text("\n".join(["epoch,train_loss,val_loss,val_auroc", *lines]))
    figures.curves(tmp_path)
    assert np.asarray(Image.open(tmp_path / "curves.png").convert("L")).std() > 5
