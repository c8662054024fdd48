"""Curves of a run: how updates are thinned and smoothed, and what matplotlib leaves behind."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from raycontrolnet.report import curves
from raycontrolnet.text import short_number


def test_thinning() -> None:
    x, y = np.arange(1000.0), np.zeros(1000)
    y[[3, 777]] = -5, 9
    thinned = curves.thin(x, y, 300)
    assert all(column.shape == (300,) for column in thinned)
    assert thinned.low.min() == -5
    assert thinned.high.max() == 9
    assert 0 <= thinned.x[0] < 4
    assert 995 < thinned.x[-1] <= 999
    assert (np.diff(thinned.x) > 0).all()
    few = curves.thin(x[:5], y[:5])
    assert all((column == wanted).all() for column, wanted in zip(few, (x[:5], y[:5], y[:5], y[:5]), strict=True))
    assert curves.thin(x[:0], y[:0]).x.size == 0


def test_smoothing() -> None:
    values = np.random.default_rng(0).normal(3, 1, 500)
    smoothed = curves.smooth(values)
    reach = round(500 * curves.SMOOTHED_SHARE / 2)
    assert smoothed[250] == pytest.approx(values[250 - reach : 251 + reach].mean())
    assert smoothed[-1] == pytest.approx(values[-1 - reach :].mean())
    assert curves.smooth(values[:3]) == pytest.approx(values[:3])


def test_matplotlib_waits_until_it_is_needed_and_stays_out_of_sight() -> None:
    """No import with the module, no pyplot with its global state, and no setting left changed."""
    code = """
import sys
import numpy as np
from raycontrolnet.report import curves
assert "matplotlib" not in sys.modules
import matplotlib
matplotlib.rcParams["text.usetex"] = True  # a user's own style, which would need LaTeX
before = matplotlib.rcParams.copy()
assert "<text" in curves.learning_rate(np.arange(3.0), np.ones(3))
assert matplotlib.rcParams.copy() == before
assert matplotlib.rcParams["text.usetex"]
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_numbers_that_are_close_are_told_apart() -> None:
    axes = curves.new_axes()
    curves.limit(axes, 0.218674, 0.218676)
    labels = [axes.yaxis.get_major_formatter()(tick, 0) for tick in axes.get_yticks()]
    assert len(set(labels)) == len(labels) > 2, labels
    for low, high in ((0.2, 0.2 + 1e-17), (0.0, 3e-8), (-2e-8, 1e-8), (1e-8, 1e-8), (0.0, 0.0), (1e6, 1e6 + 5)):
        curves.limit(axes, low, high)
        labels = [axes.yaxis.get_major_formatter()(tick, 0) for tick in axes.get_yticks()]
        assert len(set(labels)) == len(labels) > 2, labels
        assert max(map(len, labels)) < 10, labels
    assert axes.yaxis.get_major_formatter()(1e-17, 0) == "0"
    curves.limit(axes, 0.1, 0.4)
    assert axes.yaxis.get_major_formatter()(0.30000000000000004, 0) == "0.3"


def test_numbers_at_the_axes() -> None:
    wanted = {
        0: "0",
        500: "500",
        12000: "12k",
        2.5e6: "2.5M",
        2_567_463_684: "2.567B",
        999_960: "1M",
        5e12: "5e12",
        1e-5: "1e-5",
        0.30000000000000004: "0.3",
        -2e-4: "-0.0002",
    }
    assert {number: short_number(number) for number in wanted} == wanted
