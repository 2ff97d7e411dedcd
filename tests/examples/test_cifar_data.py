import hashlib
import pickle
import re
import struct
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cifar.archives import Archive
from cifar.data import CIFAR, Cifar, Layout, _crop, _split_digits, augment, load_cifar, load_dataset, normalize
from packed import tar_gz


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def md5(content):
    return hashlib.md5(content).hexdigest()


# ---- a small CIFAR in the official layouts --------------------------------------------------------------------------


def python2_pickle(images, label_key, labels):
    """The pickle that NumPy on Python 2 makes of a batch: protocol 2, byte strings, 0 and 1 for flags."""

    def text(content):
        return b"U" + bytes([len(content)]) + content

    dtype = (
        b"cnumpy\ndtype\n("
        + text(b"u1")
        + b"K\x00K\x01tR(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR"
    shape = b"(" + b"".join(b"J" + struct.pack("<i", n) for n in images.shape) + b"t"
    array += b"(K\x01" + shape + dtype + b"\x89" + b"T" + struct.pack("<i", images.size) + images.tobytes() + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(label_key.encode()) + numbers + b"u."


def python3_pickle(images, label_key, labels):
    return pickle.dumps({"data": images, label_key: [int(label) for label in labels]}, 2)


class Fake:
    """A made-up CIFAR-10 (one label byte) or CIFAR-100 (two): two training files of 6 images, a test file of 4."""

    def __init__(self, label_bytes, pickled=python2_pickle):
        generator = np.random.default_rng(label_bytes)
        classes = 10**label_bytes
        label_key = {1: "labels", 2: "fine_labels"}[label_bytes]
        self.binary, self.python, self.images, self.labels = {}, {}, [], []
        for name, count in (("batch_1", 6), ("batch_2", 6), ("test", 4)):
            images = generator.integers(0, 256, (count, 3072), np.uint8)
            labels = generator.integers(classes - 5, classes, count, np.uint8)
            coarse = generator.integers(0, 20, (count, label_bytes - 1), np.uint8)
            self.binary[f"{name}.bin"] = np.concatenate([coarse, labels[:, None], images], axis=1).tobytes()
            self.python[name] = pickled(images, label_key, labels)
            self.images.append(images.reshape(-1, 3, 32, 32))
            self.labels.append(labels)
        self.source = Cifar(
            num_classes=classes,
            archive=Archive("http://127.0.0.1:1/fake.tar.gz", md5(self.tar_gz())),  # where nobody listens
            binary=self.layout("fake-bin", self.binary),
            label_bytes=label_bytes,
            python=self.layout("fake-py", self.python),
            label_key=label_key,
            mean=(0.5, 0.4, 0.3),
            std=(0.2, 0.3, 0.1),
        )

    @staticmethod
    def layout(folder, files):
        sums = {name: md5(content) for name, content in files.items()}
        test = {name: sums.pop(name) for name in list(sums) if name.startswith("test")}
        return Layout(folder, sums, test)

    def tar_gz(self):
        return tar_gz({f"fake-bin/{name}": content for name, content in self.binary.items()})

    def lay_out(self, data_dir, version):
        folder = data_dir / getattr(self.source, version).folder
        folder.mkdir()
        for name, content in getattr(self, version).items():
            (folder / name).write_bytes(content)
        return folder

    def load(self, data_dir, source=None, download=True):
        return load_cifar("fake", source or self.source, data_dir, download=download, progress=False)


@pytest.fixture(params=[1, 2], ids=["cifar10", "cifar100"])
def fake(request, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return Fake(request.param)


def assert_loaded(data, fake):
    for images, labels, parts in (
        (data.train_images, data.train_labels, slice(0, 2)),
        (data.test_images, data.test_labels, slice(2, 3)),
    ):
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert images.is_contiguous()
        np.testing.assert_array_equal(images.numpy(), np.concatenate(fake.images[parts]))
        np.testing.assert_array_equal(labels.numpy(), np.concatenate(fake.labels[parts]))
    assert (data.name, data.num_classes, data.flip, data.pad) == ("fake", fake.source.num_classes, True, 4)
    assert (data.mean, data.std) == (fake.source.mean, fake.source.std)


@pytest.mark.parametrize("version", ["binary", "python"])
def test_folder_that_lies_there_is_used_without_network(fake, tmp_path, version):
    fake.lay_out(tmp_path, version)
    assert_loaded(fake.load(tmp_path), fake)


def test_archive_that_lies_there_is_unpacked_without_network(fake, tmp_path):
    (tmp_path / "fake.tar.gz").write_bytes(fake.tar_gz())
    assert_loaded(fake.load(tmp_path), fake)
    assert (tmp_path / "fake-bin" / "test.bin").read_bytes() == fake.binary["test.bin"]


@pytest.mark.parametrize("label_bytes", [1, 2])
def test_pickles_of_python_3_are_read_too(tmp_path, label_bytes):
    fake = Fake(label_bytes, python3_pickle)
    fake.lay_out(tmp_path, "python")
    assert_loaded(fake.load(tmp_path), fake)


def test_binary_goes_before_python_and_python_before_the_archive(fake, tmp_path):
    (fake.lay_out(tmp_path, "python") / "test").write_bytes(b"wrong")
    (tmp_path / "fake.tar.gz").write_bytes(fake.tar_gz())
    with pytest.raises(ValueError, match="fake-py"):
        fake.load(tmp_path)
    fake.lay_out(tmp_path, "binary")
    assert_loaded(fake.load(tmp_path), fake)


@pytest.mark.parametrize(
    ("version", "name"), [("binary", "batch_2.bin"), ("python", "batch_2"), ("binary", "test.bin")]
)
@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:99] + bytes([b[99] ^ 1]) + b[100:], lambda b: b[:0]])
def test_wrong_file_is_named_with_both_sums(fake, tmp_path, version, name, damage):
    path = fake.lay_out(tmp_path, version) / name
    good = path.read_bytes()
    path.write_bytes(damage(good))
    expected = (
        rf"{re.escape(str(path))} must have the md5 {md5(good)}, got {md5(damage(good))} \({len(damage(good)):,} b"
    )
    with pytest.raises(ValueError, match=expected):
        fake.load(tmp_path)


@pytest.mark.parametrize(("version", "name"), [("binary", "batch_1.bin"), ("python", "test")])
def test_missing_file_is_named(fake, tmp_path, version, name):
    path = fake.lay_out(tmp_path, version) / name
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{re.escape(str(path))} is missing: .* or remove {path.parent} to"):
        fake.load(tmp_path)


def test_nothing_there(fake, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=rf"put {fake.source.archive.url} \(md5 {fake.source.archive.md5}\) at "
    ):
        fake.load(tmp_path, download=False)
    with pytest.raises(OSError, match=rf"could not be downloaded.* put {fake.source.archive.url}"):
        fake.load(tmp_path)


def test_rejects_files_of_another_form(fake, tmp_path):
    """Files that have the right md5, in a table that describes them wrongly."""
    fake.lay_out(tmp_path, "binary")
    with pytest.raises(ValueError, match=r"batch_1.bin must hold whole records of 3075 bytes, got 18,4[34]. bytes"):
        fake.load(tmp_path, replace(fake.source, label_bytes=3))
    with pytest.raises(ValueError, match=r"batch_1.bin must hold labels from 0 to 4, got \["):
        fake.load(tmp_path, replace(fake.source, num_classes=5))


@pytest.mark.parametrize(
    "images", [np.zeros((6, 3073), np.uint8), np.zeros((5, 3072), np.uint8), np.zeros((6, 3072), np.int16)]
)
def test_rejects_pickles_of_another_form(tmp_path, images):
    fake = Fake(1, lambda _, key, labels: python3_pickle(images, key, labels))
    fake.lay_out(tmp_path, "python")
    expected = re.escape(f"shape (6, 3072), one for each label, got {images.dtype} of shape {images.shape}")
    with pytest.raises(ValueError, match=f"batch_1 must hold uint8 images of {expected}"):
        fake.load(tmp_path)


def test_malicious_pickle_is_refused_and_not_run(tmp_path):
    evil = b"cbuiltins\nopen\n(V" + bytes(tmp_path / "made") + b"\nVw\ntR."
    fake = Fake(1, lambda *_: evil)
    folder = fake.lay_out(tmp_path, "python")
    with pytest.raises(ValueError, match=rf"{folder / 'batch_1'} must be .* builtins.open is not admitted"):
        fake.load(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["fake-py"]


@pytest.mark.parametrize(
    ("name", "file", "expected"),
    [
        ("cifar10", "cifar-10-batches-bin/data_batch_1.bin", "5dd7e06a14cb22eb9f671a540d1b7c25"),
        ("cifar10", "cifar-10-batches-py/data_batch_1", "c99cafc152244af753f735de768cd75f"),
        ("cifar10", "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
        ("cifar100", "cifar-100-binary/train.bin", "6172c7755cfe09b2fe270c85cebc1b15"),
        ("cifar100", "cifar-100-python/train", "16019d7e3df5f24257cddd939b257f8d"),
        ("cifar100", "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
    ],
)
def test_published_files_are_expected(tmp_path, name, file, expected):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{file} must have the md5 {expected}"):
        load_dataset(name, tmp_path)


def test_published_sums_are_complete():
    sums = [md5 for cifar in CIFAR.values() for layout in (cifar.binary, cifar.python)
            for md5 in (*layout.train.values(), *layout.test.values())]  # fmt: skip
    assert all(re.fullmatch("[0-9a-f]{32}", md5) for md5 in sums)
    assert len(set(sums)) == len(sums) == 2 * (6 + 2)


def test_rejects_unknown_name(tmp_path):
    with pytest.raises(ValueError, match="must be one of digits, cifar10, cifar100, got 'mnist'"):
        load_dataset("mnist", tmp_path)


# ---- digits ---------------------------------------------------------------------------------------------------------


def test_digits(tmp_path):
    from sklearn.datasets import load_digits

    data = load_dataset("digits", tmp_path / "not needed")
    assert data.train_images.shape == (1437, 1, 16, 16)
    assert data.test_images.shape == (360, 1, 16, 16)
    assert data.train_images.dtype == torch.uint8
    assert data.train_images.is_contiguous()
    assert data.train_labels.dtype == torch.int64
    assert (data.name, data.num_classes, data.flip, data.pad) == ("digits", 10, False, 2)
    pixels = data.train_images.numpy() / 255
    np.testing.assert_allclose(data.mean, pixels.mean(), rtol=1e-12)
    np.testing.assert_allclose(data.std, pixels.std(), rtol=1e-12)
    assert not (tmp_path / "not needed").exists()

    # Train and test together are scikit-learn's images with their labels, each once.
    original = load_digits()
    expected = Counter(
        (np.kron(np.floor(image * 255 / 16 + 0.5), np.ones((2, 2))).astype(np.uint8).tobytes(), label)
        for image, label in zip(original.images, original.target, strict=True)
    )
    got = Counter(
        (image.numpy().tobytes(), label)
        for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels))
        for image, label in zip(images, labels.tolist(), strict=True)
    )
    assert got == expected


def test_digits_split_is_fixed_disjoint_and_stratified():
    from sklearn.datasets import load_digits

    labels = load_digits().target
    train, test = (part.numpy() for part in _split_digits(labels))
    assert sorted([*train, *test]) == list(range(1797))
    assert np.abs(np.bincount(labels[test]) - np.bincount(labels) / 5).max() < 1
    # These very images, on every machine and in every version.
    assert md5(np.sort(test).astype("<i8").tobytes()) == "3d863885cae43ae0b33bd74732894ec5"


def test_digits_without_scikit_learn_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape('distill[examples], from a clone with `pip install ".[ex')):
        load_dataset("digits", tmp_path)


def test_to_moves_every_tensor(tmp_path):
    data = load_dataset("digits", tmp_path)
    moved = data.to("meta")
    tensors = {name: value for name, value in vars(moved).items() if isinstance(value, torch.Tensor)}
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}
    assert len(tensors) == 4
    assert {k: v for k, v in vars(moved).items() if k not in tensors} == {
        k: v for k, v in vars(data).items() if k not in tensors
    }


# ---- augment --------------------------------------------------------------------------------------------------------


def crop_reference(images, top, left, mirror, pad):
    out = np.empty_like(images)
    height, width = images.shape[2:]
    for n, image in enumerate(images):
        for c, plane in enumerate(image):
            padded = np.pad(plane, pad, mode="reflect")
            crop = padded[top[n] : top[n] + height, left[n] : left[n] + width]
            out[n, c] = crop[:, ::-1] if mirror[n] else crop
    return out


def random_images(*shape, seed=0):
    return torch.randint(256, shape, dtype=torch.uint8, generator=rng(seed))


@pytest.mark.parametrize(
    ("channels", "height", "width", "pad"), [(3, 32, 32, 4), (1, 16, 16, 2), (2, 5, 7, 4), (3, 4, 3, 0)]
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_crop_equals_reference_at_every_offset(channels, height, width, pad, memory_format):
    side = 2 * pad + 1
    top, left, mirror = (grid.flatten() for grid in torch.meshgrid(*map(torch.arange, (side, side, 2)), indexing="ij"))
    images = random_images(len(top), channels, height, width).contiguous(memory_format=memory_format)
    got = _crop(images, top, left, mirror.bool(), pad=pad)
    expected = crop_reference(images.numpy(), top.numpy(), left.numpy(), mirror.numpy(), pad)
    np.testing.assert_array_equal(got.numpy(), expected)
    assert got.dtype == torch.uint8


@pytest.mark.parametrize("flip", [False, True])
def test_augment_draws_every_crop_and_flip_alike(flip):
    """Each of the 25 crops, mirrored or not, comes as often as the others: each image gets its own."""
    pad, count = 2, 20_000
    image = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
    names = {
        crop_reference(image.numpy(), [top], [left], [mirror], pad).tobytes(): (top, left, mirror)
        for top in range(5)
        for left in range(5)
        for mirror in range(1 + flip)
    }
    assert len(names) == 25 * (1 + flip)
    out = augment(image.expand(count, 1, 8, 8), pad=pad, flip=flip, generator=rng())
    drawn = Counter(names[crop.numpy().tobytes()] for crop in out)
    expected = count / len(names)
    assert len(drawn) == len(names)
    chi2 = sum((times - expected) ** 2 / expected for times in drawn.values())
    assert chi2 < len(names) - 1 + 5 * (2 * (len(names) - 1)) ** 0.5  # mean and five standard deviations


def test_augment_treats_the_channels_of_an_image_alike():
    images = random_images(50, 1, 9, 9).expand(50, 3, 9, 9) + torch.tensor([0, 1, 2], dtype=torch.uint8)[:, None, None]
    out = augment(images, pad=4, flip=True, generator=rng())
    assert torch.equal(out[:, 1], out[:, 0] + 1)
    assert torch.equal(out[:, 2], out[:, 0] + 2)


def test_augment_depends_on_its_generator_only():
    images, before = random_images(64, 3, 32, 32), torch.get_rng_state()
    first, second = rng(1), rng(1)
    a = [augment(images, pad=4, flip=True, generator=first) for _ in range(2)]
    b = [augment(images, pad=4, flip=True, generator=second) for _ in range(2)]
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    assert not torch.equal(a[0], a[1])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(images, random_images(64, 3, 32, 32))


class Recorder(TorchDispatchMode):
    """Records the operators that run."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func.overloadpacket._qualified_op_name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def test_augment_and_normalize_are_one_batch_and_never_wait_for_the_device():
    recorded = []
    for count in (2, 50):
        images, generator = random_images(count, 3, 32, 32), rng()
        with Recorder() as recorder:
            normalize(augment(images, pad=4, flip=True, generator=generator), (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
        recorded.append(recorder.ops)
    assert recorded[0] == recorded[1]
    # These read a device's memory or, as lift_fresh of a tensor made from Python numbers, write it from the host's.
    assert not {"_local_scalar_dense", "item", "nonzero", "masked_select", "lift_fresh", "is_nonzero"} & set(
        recorded[0]
    )


@pytest.mark.parametrize("pad", [-1, 5])
def test_augment_rejects_pad(pad):
    with pytest.raises(ValueError, match=f"less than the 5x6 pixels of an image, got {pad}"):
        augment(random_images(2, 3, 5, 6), pad=pad, flip=True, generator=rng())


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)])
def test_rejects_images(images):
    expected = re.escape(f"must be uint8 of shape (N, C, H, W), got {images.dtype} of shape {tuple(images.shape)}")
    with pytest.raises(ValueError, match=expected):
        augment(images, pad=1, flip=True, generator=rng())
    with pytest.raises(ValueError, match=expected):
        normalize(images, (0.5,) * 3, (0.5,) * 3)


# ---- normalize ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_normalize_equals_numpy(channels, memory_format, dtype, rtol):
    images = random_images(5, channels, 8, 6)
    mean, std = (0.4914, 0.4822, 0.4465)[:channels], (0.2470, 0.2435, 0.2616)[:channels]
    got = normalize(images, mean, std, dtype=dtype, memory_format=memory_format)
    expected = (images.numpy() / 255 - np.reshape(mean, (-1, 1, 1))) / np.reshape(std, (-1, 1, 1))
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=memory_format)
    np.testing.assert_allclose(got.double().numpy(), expected, rtol=rtol, atol=1e-6)


def test_normalize_is_float32_and_channels_last_by_default():
    got = normalize(random_images(2, 3, 4, 4), (0.5,) * 3, (0.5,) * 3)
    assert got.dtype == torch.float32
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("mean", "std"), [((0.5,), (0.5,)), ((0.5,) * 3, (0.5,)), ((0.5,) * 3, (0.5, 0.5, 0.0)), ((0.5,) * 4, (0.5,) * 4)]
)
def test_normalize_rejects_statistics(mean, std):
    with pytest.raises(ValueError, match=re.escape(f"must hold 3 values, std positive ones, got {mean} and {std}")):
        normalize(random_images(2, 3, 4, 4), mean, std)


def test_normalize_rejects_integer_dtype():
    with pytest.raises(ValueError, match=r"must be a floating-point type, got torch.int64"):
        normalize(random_images(2, 3, 4, 4), (0.5,) * 3, (0.5,) * 3, dtype=torch.int64)
