"""Work on weights without a server: convert files, save what the ranks of a model hold."""

from headrace.loader.convert import convert_folder

__all__ = ["convert_folder"]
