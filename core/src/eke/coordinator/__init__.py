"""What stands in a Trainer's callback list for all of its techniques.

Lightning calls every hook of every callback in every step, about 108 Python calls for a callback that does nothing. So
all techniques of a Trainer are taken off its callback list and one coordinator stands in their place: it calls, in
the order that the records imply, only those that have something to do, and holds one wrapper per seam.

``opening`` decides who may run and in which order, ``wiring`` puts the seams into the run and takes them out,
``checkpoint`` saves and restores, ``hooks`` forwards Lightning's own.
"""

from eke.coordinator.coordinator import Coordinator

__all__ = ["Coordinator"]
