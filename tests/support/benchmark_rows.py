"""Made-up measurements for the tests of the benchmarks."""

from loss_report import Row


def make_row(way, ms, *, case="logits/kl/1024x1000/float32", extra=12.0, **changes):
    table, loss, shape, dtype = case.split("/")
    setting = {"device": "a box", "torch": "2.13", "python": "3.11", "revision": "abc", "date": "2026-11-22"}
    numbers = {"ms": ms, "ms_low": ms * 0.9, "ms_high": ms * 1.1, "extra_mb": extra, "gradient_mb": 4.1}
    numbers |= {"over_ours": ms / 4, "over_ours_low": ms / 5, "over_ours_high": ms / 2, "repeats": 7, "inner": 1}
    names = {"case": case, "table": table, "loss": loss, "shape": shape, "dtype": dtype, "way": way}
    return Row.from_dict({**names, **numbers, **setting, **changes})
