"""The data sets of the example, whole in memory as uint8, and what is done to a batch of them on its device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cifar.archives import Archive, fetch, read_checked, unpickle_arrays

_PIXELS = 3 * 32 * 32  # bytes of one CIFAR image: red, green, blue planes, each row by row
_Arrays = tuple[npt.NDArray[Any], npt.NDArray[Any]]  # images (N, 3072) uint8, labels (N,) of any integer type


@dataclass(frozen=True, eq=False)  # tensors have no single truth value to compare by
class Dataset:
    """A labelled image data set, whole in memory.

    Attributes:
        name: `"digits"`, `"cifar10"` or `"cifar100"`.
        train_images: Shape (N, C, H, W), uint8, contiguous.
        train_labels: Shape (N,), int64.
        test_images: Shape (M, C, H, W), uint8, contiguous.
        test_labels: Shape (M,), int64.
        num_classes: Labels run from 0 to `num_classes - 1`.
        mean: Per channel, of pixels scaled to [0, 1].
        std: Per channel, of pixels scaled to [0, 1].
        flip: Whether a horizontal flip keeps the label.
        pad: Pixels of reflection padding for the random crop.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    pad: int

    def to(self, device: torch.device | str) -> Dataset:
        """Copy the tensors to a device.

        Args:
            device: Where to.

        Returns:
            The same data set with its tensors there.
        """
        return replace(
            self,
            train_images=self.train_images.to(device),
            train_labels=self.train_labels.to(device),
            test_images=self.test_images.to(device),
            test_labels=self.test_labels.to(device),
        )


@dataclass(frozen=True)
class Layout:
    """A folder of data files.

    Attributes:
        folder: Its name in the data directory.
        train: Name and md5 of the training files, in order.
        test: Name and md5 of the test files.
    """

    folder: str
    train: Mapping[str, str]
    test: Mapping[str, str]


@dataclass(frozen=True)
class Cifar:
    """What there is to know about one of the two CIFAR data sets.

    Attributes:
        num_classes: The number of labels.
        archive: The official archive, binary version.
        binary: What the archive unpacks to.
        label_bytes: Bytes before an image in a binary record. The last one is the label: CIFAR-100 puts a coarse
            label before the fine one.
        python: The python version, which torchvision leaves behind.
        label_key: Where the python version keeps the labels.
        mean: Per channel, of training pixels scaled to [0, 1].
        std: Per channel, of training pixels scaled to [0, 1].
    """

    num_classes: int
    archive: Archive
    binary: Layout
    label_bytes: int
    python: Layout
    label_key: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


CIFAR = {
    "cifar10": Cifar(
        num_classes=10,
        archive=Archive("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
        binary=Layout(
            "cifar-10-batches-bin",
            train={
                "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
                "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
                "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
                "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
                "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
            },
            test={"test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d"},
        ),
        label_bytes=1,
        python=Layout(
            "cifar-10-batches-py",
            train={
                "data_batch_1": "c99cafc152244af753f735de768cd75f",
                "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                "data_batch_4": "634d18415352ddfa80567beed471001a",
                "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            },
            test={"test_batch": "40351d587109b95175f43aff81a1287e"},
        ),
        label_key="labels",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    "cifar100": Cifar(
        num_classes=100,
        archive=Archive("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
        binary=Layout(
            "cifar-100-binary",
            train={"train.bin": "6172c7755cfe09b2fe270c85cebc1b15"},
            test={"test.bin": "4499cfba6c016c1be1438163640a0898"},
        ),
        label_bytes=2,
        python=Layout(
            "cifar-100-python",
            train={"train": "16019d7e3df5f24257cddd939b257f8d"},
            test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        ),
        label_key="fine_labels",
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
}


def load_dataset(name: str, data_dir: Path, *, download: bool = True, progress: bool = True) -> Dataset:
    """Load a data set into memory.

    Args:
        name: `"digits"`, `"cifar10"` or `"cifar100"`.
        data_dir: Where the CIFAR files lie or are to be put. Digits come with scikit-learn and need no folder.
        download: Whether CIFAR may be downloaded where it is not in `data_dir`.
        progress: Whether a download shows a progress bar.

    Returns:
        The data set, on the CPU.

    Raises:
        ValueError: The name is none of the three, or a file is not the official one.
        FileNotFoundError: A file is missing, and `download` is off or does not apply to it.
        OSError: The archive could not be downloaded.
        ModuleNotFoundError: Digits are wanted and scikit-learn is not installed.
    """
    if name == "digits":
        return _load_digits()
    if name in CIFAR:
        return load_cifar(name, CIFAR[name], data_dir, download=download, progress=progress)
    raise ValueError(f"the data set must be one of {', '.join(['digits', *CIFAR])}, got {name!r}")


def load_cifar(name: str, source: Cifar, data_dir: Path, *, download: bool, progress: bool) -> Dataset:
    """Load a CIFAR data set: the binary folder, else the python folder, else the archive, else a download of it.

    Args:
        name: The name that the data set gets.
        source: Where its files are, and what they must be.
        data_dir: Where they lie or are to be put.
        download: Whether the archive may be downloaded.
        progress: Whether a download shows a progress bar.

    Returns:
        The data set, on the CPU.

    Raises:
        ValueError: A file is not the one that `source` describes.
        FileNotFoundError: A file is missing, and `download` is off or does not apply to it.
        OSError: The archive could not be downloaded.
    """

    def parse_binary(path: Path, content: bytes) -> _Arrays:
        return _parse_binary(path, content, label_bytes=source.label_bytes)

    def parse_python(path: Path, content: bytes) -> _Arrays:
        return _parse_python(path, content, label_key=source.label_key)

    binary, python = data_dir / source.binary.folder, data_dir / source.python.folder
    if python.is_dir() and not binary.is_dir():
        folder, layout, parse = python, source.python, parse_python
    else:
        fetch(source.archive, binary, download=download, progress=progress)
        folder, layout, parse = binary, source.binary, parse_binary
    train_images, train_labels = _read(folder, layout.train, parse, source.num_classes)
    test_images, test_labels = _read(folder, layout.test, parse, source.num_classes)
    return Dataset(
        name=name,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        num_classes=source.num_classes,
        mean=source.mean,
        std=source.std,
        flip=True,
        pad=4,
    )


def _read(
    folder: Path, files: Mapping[str, str], parse: Callable[[Path, bytes], _Arrays], num_classes: int
) -> tuple[Tensor, Tensor]:
    remedy = f"put the official file in its place, or remove {folder} to have the data set fetched anew"
    parts = []
    for name, md5 in files.items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {remedy}")
        images, labels = parse(path, read_checked(path, md5, remedy=remedy))
        if not all(0 <= label < num_classes for label in np.unique(labels)):
            raise ValueError(f"{path} must hold labels from 0 to {num_classes - 1}, got {np.unique(labels)}")
        parts.append((images, labels))
    pixels = np.concatenate([images for images, _ in parts]).reshape(-1, 3, 32, 32)
    classes = np.concatenate([labels for _, labels in parts]).astype(np.int64)
    return torch.from_numpy(pixels), torch.from_numpy(classes)


def _parse_binary(path: Path, content: bytes, *, label_bytes: int) -> _Arrays:
    record = label_bytes + _PIXELS
    if not content or len(content) % record:
        raise ValueError(f"{path} must hold whole records of {record} bytes, got {len(content):,} bytes")
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    return records[:, label_bytes:], records[:, label_bytes - 1]


def _parse_python(path: Path, content: bytes, *, label_key: str) -> _Arrays:
    batch = unpickle_arrays(path, content)
    if not isinstance(batch, dict) or not {"data", label_key} <= batch.keys():
        raise ValueError(f"{path} must hold a dict with data and {label_key}")
    images, labels = batch["data"], batch[label_key]
    if isinstance(labels, list) and all(type(label) is int for label in labels):
        labels = np.array(labels, np.int64)
    if not isinstance(images, np.ndarray) or not isinstance(labels, np.ndarray) or labels.ndim != 1:
        raise ValueError(f"{path} must hold an array of images and a list of labels")
    if images.dtype != np.uint8 or images.shape != (len(labels), _PIXELS):
        raise ValueError(
            f"{path} must hold uint8 images of shape ({len(labels)}, {_PIXELS}), one for each label, "
            f"got {images.dtype} of shape {images.shape}"
        )
    return images, labels


def _load_digits() -> Dataset:
    """The 1,797 handwritten digits that come with scikit-learn, 8x8 pixels each doubled to 16x16.

    Every fifth image is a test image, once the images are shuffled with a fixed seed and ordered by label: 1,437 to
    train, 360 to test, each class in both by the same share to within one image. The same writers are in both.
    """
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # scikit-learn ships no types
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits come with scikit-learn, which is not installed: "
            'install distill[examples], from a clone with `pip install ".[examples]"`'
        ) from error
    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), from 0..16
    images = torch.from_numpy(pixels.repeat(2, axis=1).repeat(2, axis=2)[:, None])
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    train, test = _split_digits(bunch.target)
    scaled = images[train].numpy() / 255  # NumPy's sums do not depend on the number of threads
    return Dataset(
        name="digits",
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
        num_classes=10,
        mean=(float(scaled.mean()),),
        std=(float(scaled.std()),),
        flip=False,
        pad=2,
    )


def _split_digits(labels: npt.NDArray[Any]) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the test images."""
    # RandomState, since NumPy promises the same numbers from it in every version.
    shuffled = np.random.RandomState(0).permutation(len(labels))
    by_label = torch.from_numpy(shuffled[np.argsort(labels[shuffled], kind="stable")])
    is_test = torch.arange(len(labels)) % 5 == 0
    return by_label[~is_test], by_label[is_test]


def augment(images: Tensor, *, pad: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Crop each image at random from its reflection-padded self and, if wanted, mirror it at random.

    All images are done at once on their own device, and the host waits for nothing. A CUDA graph can hold it, once the
    generator is registered with the graph (`torch.cuda.CUDAGraph.register_generator_state`).

    Args:
        images: Shape (N, C, H, W), uint8.
        pad: Pixels of reflection padding on each side, less than H and W.
        flip: Whether an image is mirrored left to right with probability 1/2.
        generator: Where the randomness comes from; on the images' device.

    Returns:
        The crops, of the same shape and type.

    Raises:
        ValueError: The images or the padding are not as above.
    """
    _check_images(images)
    count, _, height, width = images.shape
    if not 0 <= pad < min(height, width):
        raise ValueError(f"pad must be at least 0 and less than the {height}x{width} pixels of an image, got {pad}")
    top, left = torch.randint(2 * pad + 1, (2, count), generator=generator, device=images.device)
    mirror = torch.randint(2, (count,), generator=generator, device=images.device).bool() if flip else None
    return _crop(images, top, left, mirror, pad=pad)


def _crop(images: Tensor, top: Tensor, left: Tensor, mirror: Tensor | None, *, pad: int) -> Tensor:
    """Crop at `top`, `left` (N,) of the padded images, then mirror those marked in `mirror` (N,)."""
    height, width = images.shape[-2:]
    # Padding, crop and flip only say where each pixel comes from, so one gather does all three. On a CPU that is twice
    # as fast as cropping windows out of padded copies, and eight times as fast as indexing by rows and columns.
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    if mirror is not None:
        columns = torch.where(mirror[:, None], columns.flip(0), columns)
    rows = _reflect(rows + top[:, None] - pad, height)
    columns = _reflect(columns + left[:, None] - pad, width)
    source = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
    pixels = images.flatten(2)
    return pixels.gather(2, source[:, None].expand_as(pixels)).view(images.shape)


def _reflect(position: Tensor, size: int) -> Tensor:
    """Where a padded position lies in the image: -1 -> 1, `size` -> `size - 2`."""
    last = size - 1
    return last - (last - position.abs()).abs()


def normalize(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
) -> Tensor:
    """Scale pixels to [0, 1] and standardise them: (x / 255 - mean) / std.

    Args:
        images: Shape (N, C, H, W), uint8.
        mean: C values.
        std: C values, positive.
        dtype: The floating-point type to return. The arithmetic is in float32.
        memory_format: The memory format to return.

    Returns:
        The standardised images, of the same shape.

    Raises:
        ValueError: The images, `mean`, `std` or `dtype` are not as above.
    """
    _check_images(images)
    channels = images.shape[1]
    if not len(mean) == len(std) == channels or min(std) <= 0:
        raise ValueError(f"mean and std must hold {channels} values, std positive ones, got {mean} and {std}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type, got {dtype}")
    # Filled on the device: a tensor made from a tuple would be copied there, and the host would wait for it.
    shift, scale = (
        torch.stack([torch.full((1, 1), value, device=images.device) for value in values]) for values in (mean, std)
    )
    # Last comes the memory format: on a CPU, broadcasting over channels-last images takes more than twice as long.
    return (images / 255).sub_(shift).div_(scale).to(dtype).contiguous(memory_format=memory_format)


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images must be uint8 of shape (N, C, H, W), got {images.dtype} of shape {(*images.shape,)}")
