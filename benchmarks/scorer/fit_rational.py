"""Fit the rational form of `x ln x` that the fused scorers use: ep_core/kernels/rational.py.

    python benchmarks/scorer/fit_rational.py          prints that file's constants

From `ln x = int_0^inf (1 / (1 + s) - 1 / (x + s)) ds` follows, with a quadrature over s,

    x ln x  ~  c1 x + c2 x^2 + sum_j w_j x / (x + t_j)      on [0, 1],

which is exactly 0 at 0: eigenvalues that are zero add nothing. The poles `-t_j` lie where rational
approximations of functions with a branch point at 0 want them, at `t_j = top exp(-rate (sqrt n -
sqrt j))` (Trefethen, Nakatsukasa, Weideman: Exponential node clustering at singularities for
rational approximation, quadrature, and PDEs, 2021); top and rate are searched. The coefficients
are linear and minimise the largest error (Lawson's reweighted least squares).
"""

from __future__ import annotations

import argparse
import math

import numpy as np

Array = np.ndarray


def sample() -> tuple[Array, Array]:
    """Points of [0, 1], dense at 0 on a logarithmic scale, and `x ln x` there."""
    x = np.unique(np.concatenate([np.logspace(-14, 0, 1400), np.linspace(0.001, 1, 600)]))
    return x, x * np.log(x)


def poles(top: float, rate: float, count: int) -> Array:
    """`t_j`, ascending, the largest is `top`."""
    j = np.arange(1, count + 1)
    return top * np.exp(-rate * (math.sqrt(count) - np.sqrt(j)))


def minimax(basis: Array, values: Array, rounds: int) -> tuple[float, Array]:
    """Coefficients with the smallest largest error, and that error."""
    weights = np.ones(len(values))
    best = math.inf, np.zeros(basis.shape[1])
    for _ in range(rounds):
        root = np.sqrt(weights)
        coefficients = np.linalg.lstsq(basis * root[:, None], values * root, rcond=1e-15)[0]
        error = np.abs(basis @ coefficients - values)
        best = min(best, (float(error.max()), coefficients), key=lambda pair: pair[0])
        weights *= error / error.max() + 1e-3
        weights /= weights.mean()
    return best


def fit(count: int) -> tuple[float, Array, Array]:
    """Largest error, coefficients `[c1, c2, w_1 .. w_n]` and poles for `count` poles."""
    x, values = sample()

    def attempt(top: float, rate: float, rounds: int) -> tuple[float, Array]:
        t = poles(top, rate, count)
        basis = np.column_stack([x, x * x, x[:, None] / (x[:, None] + t)])
        return minimax(basis, values, rounds)

    top, rate, step = 4.0, 2 * math.pi, 0.5
    error = attempt(top, rate, 15)[0]
    while step > 0.01:  # a compass search: two parameters, a smooth valley
        for new_top, new_rate in (
            (top * math.exp(step), rate),
            (top * math.exp(-step), rate),
            (top, rate + step / 2),
            (top, rate - step / 2),
        ):
            tried = attempt(new_top, new_rate, 15)[0]
            if tried < error:
                error, top, rate = tried, new_top, new_rate
                break
        else:
            step /= 2
    error, coefficients = attempt(top, rate, 200)
    return error, coefficients, poles(top, rate, count)


def main() -> None:
    """Print the constants."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--poles", type=int, default=16)
    count = parser.parse_args().poles
    error, coefficients, t = fit(count)
    x, _ = sample()
    terms = np.abs(np.column_stack([x, x * x, x[:, None] / (x[:, None] + t)]) * coefficients)
    print(f"# largest error {error:.2e}; the terms add up to at most {terms.sum(axis=1).max():.1f}")
    print(f"ERROR = {error:.2e}")
    print(f"LINEAR = {float(coefficients[0])!r}\nSQUARE = {float(coefficients[1])!r}")
    print("POLES = (")
    print("".join(f"    {float(value)!r},\n" for value in t) + ")")
    print("WEIGHTS = (")
    print("".join(f"    {float(value)!r},\n" for value in coefficients[2:]) + ")")


if __name__ == "__main__":
    main()
