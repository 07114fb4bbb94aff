"""For trainers: new weights into a fleet that serves, as one transaction."""

from .publisher import Published, PublishError, UnknownOutcomeError, WeightPublisher

__all__ = ["PublishError", "Published", "UnknownOutcomeError", "WeightPublisher"]
