"""An adapter's files from one format into another, without its model."""

from veneer.formats.content import FORMATS
from veneer.formats.convert import ConvertReport, convert_file

__all__ = ["FORMATS", "ConvertReport", "convert_file"]
