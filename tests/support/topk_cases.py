"""The divergences that take a `TopK`, at the options and the temperature that the tests of it share."""

import math

import pytest

import distill

INF = math.inf
T = 2.0


def kl(p, q):
    return sum(a * math.log(a / b) if b > 0 else INF for a, b in zip(p, q, strict=True) if a > 0)


def mix(share, p, q):
    return [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]


def js(p, q, beta=0.3):
    m = mix(beta, p, q)
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def tvd(p, q):
    return sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2


def alpha_beta(p, q, alpha=0.4, beta=0.7):
    total = alpha + beta
    terms = [alpha / total * a**total + beta / total * b**total - a**alpha * b**beta for a, b in zip(p, q, strict=True)]
    return sum(terms) / (alpha * beta)


# The loss, and its value for the two distributions, without the factor T^2 where it has one.
DIVERGENCES = {
    "kl": ({}, kl, 2),
    "reverse_kl": ({}, lambda p, q: kl(q, p), 2),
    "js": ({"beta": 0.3}, js, 2),
    "skew_kl": ({"alpha": 0.2}, lambda p, q: kl(p, mix(0.2, p, q)), 2),
    "skew_reverse_kl": ({"alpha": 0.2}, lambda p, q: kl(q, mix(0.8, p, q)), 2),
    "tvd": ({}, tvd, 0),
    "alpha_beta": ({"alpha": 0.4, "beta": 0.7}, alpha_beta, 0),
}
each = pytest.mark.parametrize("name", DIVERGENCES)
both_forms = pytest.mark.usefixtures("form")


def build(name, temperature=T, **options):
    return distill.create_loss(name, **DIVERGENCES[name][0], temperature=temperature, **options)
