"""The sides of methods that are defined for a text and an image."""

from __future__ import annotations

from mopefuse.core.error_codes import EncoderCode
from mopefuse.errors import EncoderError
from mopefuse.fusion.base import Fusion


def text_and_image_sides(model: Fusion) -> tuple[str, str]:
    """The sides of the text and of the image, whichever is main.

    Raises:
        EncoderError: there is not one encoder of each.
    """
    sides = {model.encoder(side).modality: side for side in model.uses}
    if sides.keys() != {"text", "image"}:
        found = " and ".join(model.encoder(side).modality for side in model.uses)
        what = f"{model.config.method} needs a text and an image encoder, but they read {found}"
        raise EncoderError(EncoderCode.NEEDS_IMAGE_AND_TEXT, what, fix="use one of each as --main and --comp")
    return sides["text"], sides["image"]
