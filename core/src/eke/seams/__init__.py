"""The few places where techniques reach into a run. Each module hides one trick of Lightning."""
