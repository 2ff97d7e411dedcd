"""A model under taps: heard alone, or as the student of a Distiller."""

from distill import Distiller, LogitLoss, Term
from distill._distiller.taps import Tap, run_with_taps
from models import Net, batch


def see(model, *paths, inputs=None, copy=False):
    x = batch()[0] if inputs is None else inputs
    result, seen = run_with_taps(model, [Tap(path, copy) for path in paths], lambda: model(x), side="student")
    return result, {tap.path: value for tap, value in seen.items()}


def distiller(student=None, at="fc:input", **options):
    return Distiller(student or Net(), Net(seed=1), Term(LogitLoss(), at=at), **options)
