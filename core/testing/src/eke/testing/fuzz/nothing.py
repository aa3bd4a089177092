"""A technique that changes nothing: what fails beside it alone is the core's, or Lightning's."""

from eke import Technique, TechniqueCallback


class Nothing(TechniqueCallback):
    """Does nothing, so that the core keeps a run as it does for those that do."""

    technique = Technique(name="nothing", kind="callback")
