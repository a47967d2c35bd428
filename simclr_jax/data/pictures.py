"""Image files of every form as 8-bit RGB: 16 bits, transparency, orientation, odd formats. Imports no TensorFlow."""

import dataclasses
import io

import numpy as np
import tifffile
from PIL import Image, ImageColor, ImageOps

from simclr_jax import errors

ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")
# Images that are not read: a folder that holds them holds more than its owner will find in the run.
UNREAD = (".heic", ".heif", ".avif", ".dcm", ".nii", ".svg", ".jp2", ".psd", ".raw", ".cr2", ".nef", ".dng", ".npy")

ORIENTATION = 0x0112  # The EXIF tag; 1 is upright.
WHITE = 65535
# What Pillow raises for a file that it cannot read; SyntaxError is its way to say that a PNG is broken.
BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, tifffile.TiffFileError)


@dataclasses.dataclass(frozen=True)
class Rule:
  """How images that are no 8-bit RGB become that."""

  white: int = WHITE  # The value of a 16-bit image that becomes 255; larger ones too.
  background: str = "white"  # Behind transparent pixels: a colour as in CSS, such as "black" or "#7f7f7f".

  def __post_init__(self):
    """Raises a UserError for a background that is no colour."""
    try:
      ImageColor.getrgb(self.background)
    except ValueError as error:
      raise errors.UserError(
        f'config.data.background is "{self.background}", wanted a colour; use a name such as white, or #rrggbb.'
      ) from error


PLAIN = Rule()


def is_plain(content: bytes) -> bool:
  """Returns whether TensorFlow decodes an image as `rgb` does: 8-bit, upright, opaque, in a format that it has.

  Raises one of BROKEN where the header cannot be read.
  """
  with Image.open(io.BytesIO(content)) as image:
    if image.format == "JPEG":
      # Reading EXIF takes as long as all else here.
      return image.mode in ("L", "RGB") and (b"Exif\0" not in content[:65536] or _orientation(image) == 1)
    opaque = "transparency" not in image.info and image.mode in ("L", "P", "RGB")
    if image.format == "PNG":
      return opaque and _png_bits(content) <= 8 and _orientation(image) == 1
    return opaque and image.format == "BMP" and image.mode == "RGB"


def rgb(content: bytes, rule: Rule = PLAIN) -> np.ndarray:
  """Returns u8[H, W, 3] of an encoded image: upright by its EXIF orientation, of a film or stack the first frame.

  16 bits are scaled by 255 / rule.white (by 257 for all of them), and transparent pixels are laid over
  rule.background. Raises one of BROKEN for what cannot be decoded, floats included.
  """
  with Image.open(io.BytesIO(content)) as image:
    if image.format == "TIFF" and image.mode != "P" and _tiff_bits(content) > 8:
      return _scaled(_tiff(content), rule)
    if image.format == "PNG" and _png_bits(content) > 8 and not image.mode.startswith("I") and rule.white < WHITE:
      raise ValueError("a 16-bit colour PNG keeps 8 bits here, too few for config.data.white; save it as TIFF")
    if image.mode == "F":
      raise ValueError("its pixels are floats, whose range is unknown; save it with 8 or 16 bits")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
      return _scaled(np.asarray(image), rule)
    if "A" in image.mode or "transparency" in image.info:
      image = image.convert("RGBA")
      behind = Image.new("RGBA", image.size, (*ImageColor.getrgb(rule.background)[:3], 255))
      image = Image.alpha_composite(behind, image)
    return np.asarray(image.convert("RGB"))


def plain(content: bytes, rule: Rule = PLAIN) -> bytes:
  """Returns an encoded image as it is where `is_plain`, else its `rgb` as the bytes of a BMP."""
  if is_plain(content):
    return content
  out = io.BytesIO()
  Image.fromarray(rgb(content, rule)).save(out, "BMP")
  return out.getvalue()


def _orientation(image):
  return image.getexif().get(ORIENTATION, 1)


def _png_bits(content):
  return content[24]  # In the header, which is the first chunk.


def _tiff_bits(content):
  with tifffile.TiffFile(io.BytesIO(content)) as file:
    return file.pages.first.bitspersample


def _tiff(content):
  """Returns the first page of a TIFF of more than 8 bits, [H, W] or [H, W, channels]."""
  with tifffile.TiffFile(io.BytesIO(content)) as file:
    page = file.pages.first
    image = page.asarray()
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and image.dtype.kind == "u":
      image = np.iinfo(image.dtype).max - image
    if image.ndim == 3 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
      image = np.moveaxis(image, 0, -1)
  if image.dtype.kind not in "ui" or image.ndim not in (2, 3):
    raise ValueError(f"it is {image.dtype}{list(image.shape)}, wanted whole numbers [H, W] or [H, W, 3]")
  return image


def _scaled(image, rule):
  """Returns u8[H, W, 3] of whole numbers in which `rule.white` is white."""
  if image.ndim == 2:
    image = np.repeat(image[..., None], 3, axis=-1)
  if image.shape[-1] not in (3, 4):
    raise ValueError(f"it has {image.shape[-1]} channels, wanted 1, 3 or 4")
  values = np.clip(image.astype(np.float32) * (255 / rule.white), 0, 255)
  if image.shape[-1] == 4:
    alpha, behind = values[..., 3:] / 255, np.float32(ImageColor.getrgb(rule.background)[:3])
    values = values[..., :3] * alpha + behind * (1 - alpha)
  return np.uint8(values + 0.5)
