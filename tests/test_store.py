"""A teacher on disk: what is written is what is read, by whoever asks for it; others are refused."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from distill import (
    KLLoss,
    StoredTeacher,
    TeacherOutput,
    TeacherWriter,
    TopK,
    fingerprint,
    record,
)
from stored import generator, integers, random, same, shards, write

forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


# --- what is written is what is read ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4)], ids=["vectors", "sequences", "maps"])
def test_tensors_come_back_bit_for_bit_and_in_the_order_asked(tmp_path, dtype, shape):
    output = random(6, *shape, dtype=dtype)
    output[0, 0] = -math.inf  # a class without a probability
    teacher = write(tmp_path, range(10, 16), output)
    order = [3, 0, 5, 3]
    read = teacher([10 + at for at in order])
    assert read.dtype == dtype
    assert torch.equal(read, output[order])


def test_dtype_says_what_is_stored(tmp_path):
    output = random(4, 5)
    assert torch.equal(write(tmp_path, range(4), output, dtype=torch.bfloat16)(range(4)), output.bfloat16())


def test_sequences_of_several_lengths_are_padded_at_the_end(tmp_path):
    rows = [random(length, 5, seed=length) for length in (3, 1, 4)]
    read = write(tmp_path, [0, 1, 2], rows)([2, 0])
    assert torch.equal(read[0], rows[2])
    assert torch.equal(read[1], torch.cat([rows[0], torch.zeros(1, 5)]))


@pytest.mark.parametrize("kind", ["left", "right", "scattered"])
@pytest.mark.parametrize("k", [None, 3, 7])
def test_positions_that_the_mask_hides_are_not_stored_and_those_it_shows_go_to_their_places(tmp_path, kind, k):
    shown = {
        "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]],
        "left": [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]],
        "scattered": [[1, 0, 1, 0, 1], [1, 1, 0, 1, 1]],
    }
    mask = torch.tensor(shown[kind])
    logits, tokens = random(2, 5, 7), integers(9, 2, 5)
    logits[mask == 0] = math.nan
    teacher = write(tmp_path, [0, 1], logits, tokens, mask=mask, k=k)
    assert len(load_file(shards(tmp_path)[0])["output" if k is None else "output/log_tail"]) == 7
    read = teacher([1, 0], tokens.flip(0), mask.flip(0))
    shown, given = mask.flip(0).bool(), logits.flip(0)
    if k is None:
        assert torch.equal(read[shown], given[shown])
        assert (read[~shown] == 0).all()
    else:
        assert same(read[shown], TopK.of(given[shown], k).to(torch.float16))
        even = read[~shown].check(7)
        torch.testing.assert_close(even.log_tail, torch.full((3,), math.log(4 / 7) if k == 3 else -math.inf))
        torch.testing.assert_close(even.log_probs, torch.full((3, k), -math.log(7)).half())


def decoded(arrays, k, vocabulary):
    """Class ids from the arrays of a shard, one by one: as docs/stored-teachers.md describes them."""
    low = arrays["output/indices"].to(torch.int64)
    if vocabulary <= 65_536 or vocabulary > 131_072:
        return low
    rows = []
    for ids, high in zip(low.tolist(), arrays["output/indices_high"].tolist(), strict=True):
        rows.append([low + 65_536 * (high[at // 8] >> (7 - at % 8) & 1) for at, low in enumerate(ids)])
    return torch.tensor(rows)


@pytest.mark.parametrize("k", [7, 32])
@pytest.mark.parametrize("vocabulary", [100, 65_536, 65_537, 131_072, 131_073])
def test_packed_top_k_is_what_the_page_describes_and_comes_back(tmp_path, vocabulary, k):
    indices = random(3, 4, 50).topk(k).indices * (vocabulary // 50)
    indices[:, :, 0] = vocabulary - 1
    rows = random(3, 4, k + 1, seed=1).mul(3).log_softmax(-1)
    topk = TopK(indices, rows[..., :k], rows[..., k], 2.0)
    read = write(tmp_path, range(3), topk, vocabulary=vocabulary, temperature=2.0)(range(3))
    rounded = topk.to(torch.float16)
    assert same(read, rounded)
    assert torch.equal(read.indices.long(), indices)
    arrays = load_file(shards(tmp_path)[0])
    assert torch.equal(decoded(arrays, k, vocabulary), indices.reshape(12, k))
    assert torch.equal(arrays["output/log_probs"], rounded.log_probs.reshape(12, k))
    assert torch.equal(arrays["output/log_tail"], rounded.log_tail.reshape(12))
    assert arrays["output/log_tail"].dtype == torch.float32
    wanted = {100: torch.uint16, 65_536: torch.uint16, 131_073: torch.int32}.get(vocabulary, torch.uint16)
    assert arrays["output/indices"].dtype == wanted


def test_a_token_takes_at_most_140_bytes_at_k_32(tmp_path):
    indices = random(8, 256, 100).topk(32).indices * 1310
    rows = random(8, 256, 33, seed=1).log_softmax(-1)
    topk = TopK(indices, rows[..., :32], rows[..., 32])
    write(tmp_path, range(8), topk, integers(9, 8, 256), vocabulary=131_072)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) / (8 * 256) <= 140


def test_the_writer_takes_the_k_largest_itself(tmp_path):
    logits = random(2, 3, 40)
    read = write(tmp_path, [0, 1], SimpleNamespace(logits=logits), k=5, temperature=2.0)([0, 1])
    assert same(read, TopK.of(logits, 5, temperature=2.0).to(torch.float16))
    p = np.exp(logits.double().numpy() / 2)
    p = -np.sort(-p / p.sum(-1, keepdims=True), -1)
    np.testing.assert_allclose(read.log_probs.double().exp().numpy(), p[..., :5], rtol=3e-3)
    whole = read.log_probs.double().exp().sum(-1) + read.log_tail.double().exp()
    torch.testing.assert_close(whole, torch.ones(2, 3).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["tensor", "sequence", "top-k", "half top-k"])
def test_what_was_added_may_change_before_it_is_written(tmp_path, kind):
    ids, output = torch.arange(2), random(2, 3, 200_000) if "top" in kind else random(2, 3, 5)
    output = output[:, 0].clone() if kind == "tensor" else output
    if "top" in kind:
        output = TopK.of(output, 4)
        output = TopK(output.indices.int(), output.log_probs, output.log_tail)
        output = output.to(torch.float16) if kind == "half top-k" else output
    wanted = copy.deepcopy(output)
    with TeacherWriter(tmp_path, vocabulary=None if kind in ("tensor", "sequence") else 200_000) as writer:
        writer.add(ids, output)
        ids.zero_()
        for tensor in (
            [output] if isinstance(output, torch.Tensor) else [output.indices, output.log_probs, output.log_tail]
        ):
            tensor.zero_()
    asked = StoredTeacher(tmp_path)
    assert same(asked([0, 1]), wanted.to(torch.float16) if isinstance(wanted, TopK) else wanted)


def test_inference_tensors_are_stored(tmp_path):
    with torch.inference_mode():
        output, tokens = random(2, 3, 5) * 1, integers(9, 2, 3) * 1
    read = write(tmp_path / "a", [0, 1], TeacherOutput(output, {"fc": output}), tokens)([0, 1], tokens)
    assert torch.equal(read, output)
    assert same(write(tmp_path / "b", [0, 1], output, k=2)([0, 1]), TopK.of(output, 2).to(torch.float16))


def test_drawn_classes_and_lists_of_top_k_are_stored_too(tmp_path):
    logits = [random(length, 30, seed=length) for length in (2, 5)]
    topks = [TopK.of(each, 4, samples=3, generator=generator()) for each in logits]
    read = write(tmp_path, [0, 1], topks, vocabulary=30)([1])
    assert (read.k, read.samples) == (4, 3)
    assert same(read[0], topks[1].to(torch.float16))
    short = StoredTeacher(tmp_path)([0, 1])[0, 2:]  # padding is a TopK like any other
    assert short.check(30).k == 4


def test_classes_without_a_probability_are_stored(tmp_path):
    logits = random(2, 3, 9)
    logits[..., 2:] = -math.inf
    read = write(tmp_path, [0, 1], logits, k=4)([0, 1])
    assert same(read, TopK.of(logits, 4).to(torch.float16))
    assert (read.log_probs[..., 2:] == -math.inf).all()
    assert (read.log_probs.exp().sum(-1) + read.log_tail.exp() - 1).abs().max() < 1e-3


def test_all_classes_may_be_kept(tmp_path):
    logits = random(2, 5)
    read = write(tmp_path, [0, 1], logits, k=5)([0, 1])
    student = random(2, 5, seed=1)
    torch.testing.assert_close(KLLoss(1.0)(student, read), KLLoss(1.0)(student, logits), rtol=1e-3, atol=1e-3)


def test_outputs_may_be_mappings_and_features_may_stand_alone(tmp_path):
    assert torch.equal(write(tmp_path / "a", [0], {"logits": random(1, 5)})([0]), random(1, 5))
    teacher = write(tmp_path / "b", [0], TeacherOutput(features={"fc": random(1, 5)}))
    assert teacher([0]) is None
    assert torch.equal(teacher.read([0]).features["fc"], random(1, 5))


# --- it belongs to what is asked ---


def test_other_tokens_are_refused_with_both_hashes(tmp_path):
    tokens = integers(100, 2, 6)
    asked = write(tmp_path, [0, 1], random(2, 6, 5), tokens)
    for same_tokens in (tokens.int(), [*tokens], tokens.flip(0).flip(0)):
        asked([0, 1], same_tokens)
    other = tokens.clone()
    other[1, 5] += 1
    with pytest.raises(ValueError, match=r"of id 1 must be those that the teacher saw, with the hash -?\d+, got -?\d+"):
        asked([0, 1], other)
    with pytest.raises(ValueError, match=r"of id 0 must be those"):
        asked([0, 1], tokens[:, :5])
    with pytest.raises(ValueError, match="give the mask as well"):
        asked([0, 1], torch.cat([tokens, torch.zeros(2, 1).long()], 1))
    with pytest.raises(ValueError, match="checked only where they were stored"):
        write(tmp_path / "none", [0, 1], random(2, 6, 5))([0, 1], tokens)


def test_padding_with_other_tokens_than_the_mask_hides_does_not_matter(tmp_path):
    tokens, mask = integers(100, 2, 6), torch.ones(2, 6)
    mask = mask.bool()
    mask[0, 4:] = False
    asked = write(tmp_path, [0, 1], random(2, 6, 5), tokens, mask=mask)
    longer = torch.cat([tokens, torch.full((2, 3), 7)], 1)
    read = asked([0, 1], longer, torch.cat([mask, torch.zeros(2, 3).bool()], 1))
    assert read.shape == (2, 9, 5)
    assert torch.equal(read[:, :6][mask], random(2, 6, 5)[mask])
    with pytest.raises(ValueError, match=r"the output of id 0 has 4 positions, got 5 in the mask"):
        asked([0], None, mask=torch.ones(1, 5).long())
    with pytest.raises(ValueError, match=r"of id 0 has 4 positions, got 6 tokens \(a padded batch needs its mask\)"):
        write(tmp_path / "list", [0], [random(4, 5)], [tokens[0]])([0], tokens[:1])


def view(image, sample, seed):
    """A crop and a flip that follow from the sample and the seed alone."""
    draw = torch.Generator().manual_seed(seed * 1_000_003 + sample)
    top, left, flip = (int(torch.randint(high, (), generator=draw)) for high in (5, 5, 2))
    cut = nn.functional.pad(image, (2, 2, 2, 2))[:, top : top + 8, left : left + 8]
    return cut.flip(-1) if flip else cut


def test_an_answer_belongs_to_one_augmented_view(tmp_path):
    images, teacher = random(4, 3, 8, 8), nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).eval()

    def views(seed):
        return torch.stack([view(image, at, seed) for at, image in enumerate(images)])

    with TeacherWriter(tmp_path, model=teacher) as writer:
        for seed in (0, 1):
            pairs = torch.stack([torch.arange(4), torch.full((4,), seed)], 1)
            writer.add(pairs, record(teacher, views(seed)), views(seed))
    asked = StoredTeacher(tmp_path)
    pairs = torch.tensor([[2, 1], [0, 0]])
    pixels = torch.stack([view(images[2], 2, 1), view(images[0], 0, 0)])
    torch.testing.assert_close(asked(pairs, pixels), teacher(pixels))  # the same view, made again from its seed
    assert asked.ids().tolist() == [[at, seed] for at in range(4) for seed in (0, 1)]
    with pytest.raises(ValueError, match=r"of id \[2, 1\] must be those that the teacher saw"):
        asked(pairs, torch.stack([view(images[2], 2, 0), pixels[1]]))
    with pytest.raises(KeyError, match=r"every sample must be stored, got \[2, 7\], one of 1 that are not"):
        asked([[2, 7]])
    unchecked = asked([[2, 0]])
    assert not torch.allclose(unchecked, teacher(pixels[:1]))  # without pixels nothing is compared: a wrong number
    with pytest.raises(ValueError, match=r"ids in .* are pairs \(N, 2\) of a sample and a seed, got samples \(N,\)"):
        asked([2, 0])


def test_any_pairs_may_be_stored(tmp_path):
    pairs, rows = [[7, 5], [0, 5], [3, 1]], random(3, 5)
    asked = write(tmp_path / "new" / "folder", pairs, rows)
    torch.testing.assert_close(asked([[3, 1], [7, 5], [0, 5]]), rows[[2, 0, 1]])
    assert asked.ids().tolist() == sorted(pairs)
    with pytest.raises(KeyError, match=r"every sample must be stored, got \[7, 1\]"):
        asked([[7, 1]])


def test_another_model_vocabulary_or_temperature_is_refused_with_both_values(tmp_path):
    model, other = nn.Linear(3, 20), nn.Linear(3, 20)
    write(tmp_path, [0], random(1, 20), model=model, k=4, temperature=2.0)
    StoredTeacher(tmp_path, model=model, vocabulary=20, temperature=2.0)
    with pytest.raises(
        ValueError, match=f"model of what is stored in .* must be '{fingerprint(other)}', got '{fingerprint(model)}'"
    ):
        StoredTeacher(tmp_path, model=other)
    with pytest.raises(ValueError, match=r"vocabulary of what .* must be 21, got 20"):
        StoredTeacher(tmp_path, vocabulary=21)
    with pytest.raises(ValueError, match=r"temperature of what .* must be 1\.0, got 2\.0"):
        StoredTeacher(tmp_path, temperature=1.0)
    logits = write(tmp_path / "logits", [0], random(1, 20), model="served, version 3")
    StoredTeacher(tmp_path / "logits", model="served, version 3", vocabulary=20, temperature=3.0)
    with pytest.raises(ValueError, match=r"vocabulary of what .* must be 21, got 20"):
        StoredTeacher(tmp_path / "logits", vocabulary=21)
    with pytest.raises(ValueError, match=r"must be 'other', got 'served, version 3'"):
        StoredTeacher(tmp_path / "logits", model="other")
    with pytest.raises(ValueError, match=r"features must be stored, those of \[\], got 'fc'"):
        StoredTeacher(tmp_path / "logits", features=["fc"])
    assert len(logits) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "other"}, "was written with model='mine', got 'other'"),
        ({}, "was written with model='mine', got None"),
        ({"model": "mine", "k": 5}, "was written with k=4, got 5"),
        ({"model": "mine", "k": 4, "temperature": 2.0}, "was written with temperature=1.0, got 2.0"),
        ({"model": "mine", "vocabulary": 7}, "was written with vocabulary=20, got 7"),
    ],
)
def test_a_writer_with_other_options_is_refused_before_it_writes(tmp_path, options, message):
    write(tmp_path, [0], random(1, 20), model="mine", k=4)
    with pytest.raises(ValueError, match=message):
        TeacherWriter(tmp_path, **options)


class Extra(nn.Linear):
    """Saves more than tensors."""

    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        pass


def test_fingerprint_is_of_names_shapes_dtypes_and_numbers():
    model = nn.Linear(3, 2)
    first = fingerprint(model)
    assert first == fingerprint(copy.deepcopy(model))
    twin = nn.Sequential(copy.deepcopy(model))
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.weight[1, 2] += 1e-6
    assert len({first, fingerprint(twin), fingerprint(changed), fingerprint(copy.deepcopy(model).bfloat16())}) == 4
    extra = Extra(3, 2)
    extra.load_state_dict(model.state_dict(), strict=False)
    assert fingerprint(extra) == first
    with pytest.raises(ValueError, match="must have plain tensors, got Tensor on meta as 'bias'; give a name"):
        fingerprint(nn.Linear(3, 2, device="meta"))
    with pytest.raises(TypeError, match="the model must be an nn.Module, got str"):
        fingerprint("model")
