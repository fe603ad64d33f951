"""The figure of a table of diffusion shows its numbers, entropy under quality, and the held-out text."""

import pytest
import torch

from pyquiet.evaluation import DiffusionRow, DiffusionTable, Estimate
from pyquiet.plotting import plot_diffusion

pytest.importorskip("matplotlib")
COLUMNS = ("perplexity", "entropy_bits", "ngram_nll", "denoiser_calls", "energy_passes", "seconds")


@pytest.fixture(scope="module")
def table():
    generator = torch.Generator().manual_seed(0)

    def row(sampler, energy, steps):
        values = {name: 1 + torch.rand(4, generator=generator, dtype=torch.float64) for name in COLUMNS}
        trace = torch.tensor([[1.0, 2.5, 4], [0.25, 3.5, 4]]) * (steps or 0) if energy == "ar" else torch.empty(0, 3)
        return DiffusionRow(sampler, energy, steps, values, {n: Estimate(0.5, 0.01) for n in (1, 2, 3)}, trace)

    methods = [("text", "none", None), ("a", "none", 4), ("a", "ar", 2), ("a", "none", 2), ("a", "ar", 1)]
    return DiffusionTable([row(*method) for method in methods], 7, "token")


@pytest.fixture
def figures(monkeypatch):
    from matplotlib.figure import Figure

    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k)))
    return saved


@pytest.mark.parametrize("quality", ["perplexity", "ngram_nll", "variation_2"])
def test_the_figure_shows_the_table(table, tmp_path, figures, quality):
    plot_diffusion(table, tmp_path / "table.svg", quality=quality)
    assert (tmp_path / "table.svg").read_bytes().startswith(b"<?xml")
    *panels, ess = figures[0].axes
    assert len(panels) == 8
    plans = [
        (name, cost) for name in (quality, "entropy_bits") for cost in ("steps", "denoiser_calls", "passes", "seconds")
    ]
    for axes, (name, cost) in zip(panels, plans, strict=True):
        assert len(axes.containers) == 2
        for container, rows in zip(axes.containers, table.methods().values(), strict=True):
            found = [row.estimates() for row in rows]
            x, y = container.lines[0].get_data()
            costs = [row.steps for row in rows] if cost == "steps" else [e[cost].mean for e in found]
            assert list(x) == pytest.approx(costs)
            assert list(y) == pytest.approx([e[name].mean for e in found])
            ends = [segment[:, 1] for segment in container.lines[2][0].get_segments()]
            assert [end[1] - end[0] for end in ends] == pytest.approx([2 * e[name].error for e in found])
        (line,) = [line for line in axes.lines if line.get_label() == "held-out text"]
        assert line.get_ydata()[0] == pytest.approx(table.rows[0].estimates()[name].mean)
    (line,) = ess.lines  # that of the energy's row of the most steps
    assert [list(data) for data in line.get_data()] == [[2.0, 0.5], [5.0, 7.0]]
    assert line.get_color() == "C1"
    names = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert sorted(names) == ["a", "a + ar", "held-out text"]


def test_what_cannot_be_drawn_is_refused_before_it_is(table, tmp_path):
    with pytest.raises(ValueError, match="quality must be one of perplexity"):
        plot_diffusion(table, tmp_path / "table.png", quality="entropy_bits")
    with pytest.raises(ValueError, match=r"table\.jpg"):
        plot_diffusion(table, tmp_path / "table.jpg")
    assert list(tmp_path.iterdir()) == []
