"""Image preprocessing of transformers' encoders, from their image processor or by default for random weights."""

from __future__ import annotations

from typing import Any

from mopefuse.encoders.preprocess import ImagePreprocess

STATISTICS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
_SQUEEZED_FROM = 384
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers


def default_preprocess(statistics: str, size: tuple[int, int]) -> ImagePreprocess:
    """Build preprocessing for random weights, with a family's usual statistics."""
    mean, std = STATISTICS[statistics]
    return ImagePreprocess(size, mean, std, size[0] if size[0] == size[1] else size)


def from_processor(
    processor: Any, *, size: tuple[int, int] | None = None, squeeze: tuple[int, int] | None = None
) -> ImagePreprocess:
    """Build preprocessing from a transformers image processor.

    Args:
        size: overrides the declared crop size; the resize is scaled in proportion.
        squeeze: size that images are resized to without cropping, regardless of what the processor declares.
    """
    resize, crop = (squeeze, squeeze) if squeeze else _declared_sizes(processor)
    if size is not None:
        resize, crop = _scale_resize(resize, crop, size), size
    scale = 255 * (processor.rescale_factor if getattr(processor, "do_rescale", True) else 1.0)
    normalise = getattr(processor, "do_normalize", True)
    mean = [value / scale for value in (processor.image_mean if normalise else (0.0,) * 3)]
    std = [value / scale for value in (processor.image_std if normalise else (1.0,) * 3)]
    return ImagePreprocess(
        size=crop,
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        resize=resize,
        interpolation=_RESAMPLE.get(int(processor.resample), "bicubic"),
    )


def _declared_sizes(processor: Any) -> tuple[int | tuple[int, int], tuple[int, int]]:
    """Sizes to which a processor resizes and crops."""
    resize = _side(processor.size)
    crop = _side(processor.crop_size) if getattr(processor, "do_center_crop", False) else resize
    size = (crop, crop) if isinstance(crop, int) else crop
    part = getattr(processor, "crop_pct", None)
    if part and isinstance(resize, int):  # ConvNeXt crops below 384 pixels, and else resizes without cropping
        return (int(resize / part), size) if resize < _SQUEEZED_FROM else (size, size)
    return (resize if getattr(processor, "do_resize", True) else size), size


def _scale_resize(
    resize: int | tuple[int, int], crop: tuple[int, int], size: tuple[int, int]
) -> int | tuple[int, int]:
    """Scale `resize` so that it has the same ratio to `size` as to `crop`."""
    if isinstance(resize, int) and size[0] == size[1] and crop[0] == crop[1]:
        return round(resize * size[0] / crop[0])
    height, width = (resize, resize) if isinstance(resize, int) else resize
    return round(height * size[0] / crop[0]), round(width * size[1] / crop[1])


def _side(size: Any) -> int | tuple[int, int]:
    """Read a processor's size: (height, width), or the shorter side."""
    values = {key: value for key, value in dict(size).items() if value is not None}
    if "height" in values:
        return int(values["height"]), int(values["width"])
    return int(values.get("shortest_edge") or next(iter(values.values())))
