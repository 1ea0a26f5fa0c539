"""Models of several tasks: what a repair does to tasks that the defender has no images of."""
