"""The figure shows the table's numbers, in whole files or none."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

from pyquiet.evaluation import gain_by_decile
from pyquiet.plotting import check_figure, draw_gain_by_decile, plot_gain_by_decile

pytest.importorskip("matplotlib")
MAGIC = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF", ".PNG": b"\x89PNG"}


@pytest.fixture(scope="module")
def table():
    generator = torch.Generator().manual_seed(0)
    return gain_by_decile(*torch.rand(3, 57, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("suffix", list(MAGIC))
def test_the_file_is_of_its_kind_and_alone(table, tmp_path, suffix):
    path = tmp_path / f"gain{suffix}"
    plot_gain_by_decile(table, path)
    assert path.read_bytes().startswith(MAGIC[suffix])
    assert list(tmp_path.iterdir()) == [path]


def test_the_figure_shows_the_table(table, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k)))
    plot_gain_by_decile(table, tmp_path / "gain.svg", difficulty="base loss", title="Alice")
    gain, loss = saved[0].axes
    bars, errors = gain.containers[1], gain.containers[0]
    assert [bar.get_height() for bar in bars] == pytest.approx(table.gain.tolist())
    ends = [segment[:, 1] for segment in errors.lines[2][0].get_segments()]
    assert [end[1] - end[0] for end in ends] == pytest.approx((2 * table.gain_error).tolist())
    assert loss.lines[0].get_ydata() == pytest.approx(table.base_nll.tolist())
    assert loss.get_ylim()[0] == 0
    assert [x.get_text() for x in gain.get_xticklabels()] == [f"{i + 1}\n{x:.2f}" for i, x in enumerate(table.high)]
    assert "base loss" in gain.get_xlabel()
    assert saved[0].get_suptitle() == "Alice"


def test_a_single_token_has_no_error_bar(tmp_path):
    one = torch.ones(1)
    plot_gain_by_decile(gain_by_decile(one, one, one), tmp_path / "gain.png")
    assert (tmp_path / "gain.png").exists()


def test_bad_names_are_refused_before_anything_is_drawn(tmp_path):
    with pytest.raises(ValueError, match=r"gain\.jpg.*\.png, \.svg, \.pdf"):
        check_figure(tmp_path / "gain.jpg")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        check_figure(tmp_path / "nowhere" / "gain.png")


def test_without_matplotlib_the_extra_is_named(table, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for draw in (lambda: plot_gain_by_decile(table, tmp_path / "gain.png"), lambda: draw_gain_by_decile(table)):
        with pytest.raises(ImportError, match=r'pip install "pyquiet\[plot\]"'):
            draw()


def test_it_is_drawn_on_the_axes_that_are_given(table):
    from matplotlib.figure import Figure

    axes = Figure().subplots(1, 2)[1]
    assert draw_gain_by_decile(table, axes) is axes
    assert draw_gain_by_decile(table).figure is not axes.figure


def test_importing_needs_nothing_optional():
    code = (
        "import sys, pyquiet, pyquiet.cli, pyquiet.evaluation, pyquiet.plotting\n"
        "print([name for name in ('matplotlib', 'datasets', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
