"""Opens an extractor by name."""

from marjax.errors import UserError
from marjax.evaluation.networks.classifier import Classifier
from marjax.evaluation.networks.extractor import FeatureExtractor
from marjax.evaluation.networks.inception_file import open_inception
from marjax.paths import takes_paths


@takes_paths("path")
def open_extractor(name: str, path: str = "") -> FeatureExtractor:
    """Loads an extractor.

    Args:
      name: "inception" or "classifier".
      path: of the weights; "" for the default place of Inception's.

    Raises:
      UserError: an unknown name, or no weights.
    """
    if name == "inception":
        return open_inception(path or None)
    if name == "classifier":
        if not path:
            raise UserError(
                "extractor_path is not set; give a file of marjax train-classifier for extractor=classifier"
            )
        return Classifier.load(path)
    raise UserError(f"extractor={name!r} is unknown; use inception or classifier")
