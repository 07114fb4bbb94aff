"""For trainers: new weights into a fleet that serves, as one transaction."""

from .errors import PublishError, UnknownOutcomeError
from .publisher import Published, WeightPublisher

__all__ = ["PublishError", "Published", "UnknownOutcomeError", "WeightPublisher"]
