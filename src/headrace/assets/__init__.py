"""Files that come with the package: the demo model. Knows nothing of how they are used."""

from pathlib import Path


def demo_model_path() -> Path:
    """The folder of the demo model, in Hugging Face form."""
    return Path(__file__).parent / "demo"
